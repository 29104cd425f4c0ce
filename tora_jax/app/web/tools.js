// Tools on the canvas: pointer and keyboard, undo and redo.

const NEAR = 14, STEP = 0.02; // pixels of a finger; of the keyboard's cross, in shares of the canvas
const REST = 0.15, MOST_REST = 0.75; // of a pause, in shares of the time
const past = [], future = []; // strokes of before, and those that were undone
const speedMenu = find("[data-speed]"), presetMenu = find("[data-preset]"), hint = find(".hint");
let tool = "free", drag = null, spline = null;
let sample = false; // an example is shown, which the first own path replaces

// ---------------------------------------------------------------- changes

// Puts other strokes in place of these; each change can be undone.
function change(next, index = Math.min(chosen, next.length - 1)) {
  past.push(strokes);
  if (past.length > 100) past.shift();
  future.length = 0;
  set(next, index);
}

function set(next, index) {
  [strokes, chosen] = [next, index];
  redraw();
  showTools();
  changed(); // of work.js
}

function add(stroke) {
  const kept = sample ? [] : strokes;
  if (kept.length >= start.limits.paths) return say(`${start.limits.paths} paths are the most`, true);
  if (sample) ownVideo();
  change([...kept, { times: null, control: null, pauses: [], speed: "even", ...stroke }], kept.length);
}

// The example's video goes: it shows another path.
function ownVideo() {
  sample = false;
  showNothing();
}

const replaced = (index, stroke) => strokes.map((each, i) => (i === index ? stroke : each));

function undo(from, to) {
  if (!from.length) return;
  to.push(strokes);
  const next = from.pop();
  set(next, next.length - 1);
}

function showTools() {
  const stroke = strokes[chosen], count = strokes.length;
  speedMenu.disabled = !stroke;
  if (stroke) speedMenu.value = stroke.speed;
  speedMenu.querySelector("[value=drawn]").disabled = Boolean(stroke && !stroke.times);
  find("[data-do=undo]").disabled = !past.length && !spline;
  find("[data-do=redo]").disabled = !future.length;
  find("[data-do=delete]").disabled = find("[data-do=clear]").disabled = !count;
  hint.textContent = sample ? "An example: draw your own path over it"
    : count ? `${count} path${count > 1 ? "s" : ""}; dots lie equal times apart` : "Draw where things shall go";
}

// ---------------------------------------------------------------- pointer

function nearest(place) {
  let best = { index: -1, far: NEAR };
  strokes.forEach((stroke, index) => {
    const along = shares(stroke.points, size);
    for (let i = 0; i + 1 < stroke.points.length; i++) {
      const [a, b] = [inPixels(stroke.points[i]), inPixels(stroke.points[i + 1])];
      const square = distance(a, b) ** 2;
      const part = square ? clamp(((place[0] - a[0]) * (b[0] - a[0]) + (place[1] - a[1]) * (b[1] - a[1])) / square) : 0;
      const far = distance(place, [a[0] + part * (b[0] - a[0]), a[1] + part * (b[1] - a[1])]);
      if (far < best.far) best = { index, far, at: along[i] + part * (along[i + 1] - along[i]) };
    }
  });
  return best;
}

function where(event) {
  const box = canvas.getBoundingClientRect();
  const pixels = [event.clientX - box.left, event.clientY - box.top];
  return { pixels, point: [clamp(pixels[0] / canvas.clientWidth), clamp(pixels[1] / canvas.clientHeight)] };
}

const PRESS = {
  free: ({ point }) => { drag = { clock: [performance.now()] }; draft = newDraft([point]); },
  line: ({ point }) => { drag = { clock: [] }; draft = newDraft([point]); },
  spline: ({ pixels, point }) => setPoint(point, pixels),
  move: ({ pixels, point }) => {
    const control = choose(pixels)?.control;
    if (chosen < 0) return;
    const corner = control ? control.findIndex((p) => distance(inPixels(p), pixels) < NEAR) : -1;
    drag = { from: point, corner, before: strokes };
  },
  pause: ({ pixels }) => {
    const found = nearest(pixels), stroke = choose(pixels);
    if (!stroke) return;
    const rest = Math.min(REST, MOST_REST - stroke.pauses.reduce((sum, p) => sum + p.rest, 0));
    if (rest <= 0.01) return;
    const near = (p) => Math.abs(p.at - found.at) < 0.04;
    const pauses = stroke.pauses.some(near)
      ? stroke.pauses.map((p) => (near(p) ? { ...p, rest: p.rest + rest } : p))
      : [...stroke.pauses, { at: clamp(found.at), rest }];
    change(replaced(chosen, { ...stroke, pauses }));
  },
};

const newDraft = (points) => ({ points, control: null, pauses: [], speed: "even" });

function choose(pixels) {
  chosen = nearest(pixels).index;
  if (chosen >= 0) sample = false; // what is changed is one's own
  redraw();
  showTools();
  return strokes[chosen];
}

// A point of a spline; on the last one it ends.
function setPoint(point, pixels) {
  const last = spline && spline[spline.length - 1];
  if (last && distance(inPixels(last), pixels) < NEAR) return endSpline();
  spline = [...(spline || []), point];
  draft = { ...newDraft(curve(spline)), control: spline };
  paint();
  showTools();
}

function endSpline() {
  const control = spline;
  spline = draft = null;
  if (control && control.length > 1) add({ control, points: curve(control) });
  else paint();
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  event.preventDefault();
  canvas.focus();
  canvas.setPointerCapture(event.pointerId);
  cursor = null;
  if (view !== "paths") setView("paths");
  PRESS[tool](where(event));
  if (drag) playThumbs(false);
});

canvas.addEventListener("pointermove", (event) => {
  if (!drag) return;
  event.preventDefault();
  const { point } = where(event);
  if (!draft) return moveTo(point);
  if (tool === "line") draft = newDraft([draft.points[0], point]);
  else {
    const between = event.getCoalescedEvents?.() || [];
    for (const each of between.length ? between : [event]) lengthen(where(each).point);
  }
  paint();
});

function lengthen(point) {
  const { points } = draft;
  if (distance(inPixels(point), inPixels(points[points.length - 1])) < 1) return;
  draft = newDraft([...points, point]);
  drag.clock.push(performance.now());
}

function moveTo(point) {
  const stroke = drag.before[chosen], shift = [point[0] - drag.from[0], point[1] - drag.from[1]];
  let moved;
  if (drag.corner >= 0) {
    const control = stroke.control.map((p, i) => (i === drag.corner ? point : p));
    moved = { ...stroke, control, points: curve(control) };
  } else {
    for (const n of [0, 1]) { // the whole stays inside
      const values = stroke.points.map((p) => p[n]);
      shift[n] = clamp(shift[n], -Math.min(...values), 1 - Math.max(...values));
    }
    const along = (list) => list && list.map((p) => [clamp(p[0] + shift[0]), clamp(p[1] + shift[1])]);
    moved = { ...stroke, points: along(stroke.points), control: along(stroke.control) };
  }
  strokes = replaced(chosen, moved);
  redraw();
}

function release() {
  const done = drag, stroke = draft;
  drag = null;
  if (!done) return;
  playThumbs(!working);
  if (!stroke) {
    if (strokes === done.before) return;
    const next = strokes;
    strokes = done.before;
    return change(next);
  }
  draft = null;
  const { points } = stroke;
  const long = points.slice(1).reduce((sum, p, i) => sum + distance(inPixels(p), inPixels(points[i])), 0);
  if (points.length < 2 || long < 4) return paint();
  if (tool === "line") return add({ points, control: points });
  const [first, last] = [done.clock[0], done.clock[done.clock.length - 1]];
  add({ points, times: done.clock.map((t) => (t - first) / (last - first || 1)) });
}
canvas.addEventListener("pointerup", release);
canvas.addEventListener("pointercancel", () => {
  if (drag && !draft) strokes = drag.before;
  drag = draft = null;
  redraw();
});
canvas.addEventListener("dblclick", () => { if (spline) endSpline(); });

// ---------------------------------------------------------------- buttons and keys

function setTool(name) {
  if (spline) endSpline();
  tool = name;
  for (const each of all("[data-tool]")) each.setAttribute("aria-pressed", String(each.dataset.tool === name));
}

function setView(name) {
  view = name;
  for (const each of all("[data-view]")) each.setAttribute("aria-pressed", String(each.dataset.view === name));
  paint();
}

const ACTIONS = {
  undo() {
    if (!spline) return undo(past, future);
    spline = spline.length > 1 ? spline.slice(0, -1) : null;
    draft = spline && { ...newDraft(curve(spline)), control: spline };
    paint();
    showTools();
  },
  redo() { undo(future, past); },
  delete() { if (chosen >= 0) { sample = false; change(strokes.filter((_, i) => i !== chosen), strokes.length - 2); } },
  clear() {
    spline = draft = null;
    if (sample) ownVideo();
    if (strokes.length) change([], -1);
    paint();
  },
  back() { player.seek(player.frame - 1); },
  next() { player.seek(player.frame + 1); },
  play() { if (player.playing) player.pause(); else player.play(); },
  compare() {
    compare = !compare;
    find(".split").hidden = !compare;
    find("[data-do=compare]").setAttribute("aria-pressed", String(compare));
    fit();
  },
  theme() { document.body.classList.toggle("dark"); },
};

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.do) ACTIONS[button.dataset.do](button);
  else if (button?.dataset.tool) setTool(button.dataset.tool);
  else if (button?.dataset.view) setView(button.dataset.view);
});

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const KEYS = { Delete: "delete", Backspace: "delete", " ": "play", ",": "back", ".": "next" };
const TOOLS = { f: "free", l: "line", s: "spline", m: "move", p: "pause" };

function onCanvas(event) {
  const arrow = ARROWS[event.key], pace = event.shiftKey ? 5 : 1;
  if (arrow) cursor = (cursor || [0.5, 0.5]).map((v, i) => clamp(v + arrow[i] * STEP * pace));
  else if (event.key === "Enter" && cursor) {
    if (view !== "paths") setView("paths");
    if (tool !== "spline") setTool("spline");
    setPoint(cursor, inPixels(cursor));
  } else if (event.key === "Enter" || event.key === "Escape") endSpline();
  else return false;
  paint();
  return true;
}

// Undo and redo work everywhere but in fields; single keys on the canvas alone, where nobody writes.
element.addEventListener("keydown", (event) => {
  const key = event.key.toLowerCase(), command = event.ctrlKey || event.metaKey;
  if (command && event.key === "Enter") find(".ask").requestSubmit();
  else if (event.target.matches("input, textarea, select")) return;
  else if (command && (key === "y" || (key === "z" && event.shiftKey))) ACTIONS.redo();
  else if (command && key === "z") ACTIONS.undo();
  else if (command || event.target !== canvas) return;
  else if (KEYS[event.key]) ACTIONS[KEYS[event.key]]();
  else if (TOOLS[key]) setTool(TOOLS[key]);
  else if (!onCanvas(event)) return;
  event.preventDefault();
});

speedMenu.addEventListener("change", () => {
  if (chosen >= 0) change(replaced(chosen, { ...strokes[chosen], speed: speedMenu.value }));
});
for (const name of Object.keys(start.presets)) presetMenu.add(new Option(name, name));
presetMenu.addEventListener("change", () => {
  addAll(start.presets[presetMenu.value] || []);
  presetMenu.value = "";
});

// Paths of a file or a preset.
function addAll(paths) {
  for (const points of paths) {
    const stroke = strokeOf(points, size);
    if (stroke) add(stroke);
  }
}

// ---------------------------------------------------------------- the bar under the canvas

const scrub = find(".scrub"), count = find(".count"), playButton = find("[data-do=play]");
scrub.addEventListener("input", () => player.seek(Number(scrub.value)));
find(".split").addEventListener("input", (event) => { split = event.target.value / 100; paint(); });

function showTime() {
  const text = `${player.frame + 1} / ${player.frames}`, label = player.playing ? "Pause" : "Play";
  if (Number(scrub.max) !== player.frames - 1) scrub.max = player.frames - 1;
  if (Number(scrub.value) !== player.frame) scrub.value = player.frame;
  if (count.textContent !== text) count.textContent = text;
  if (playButton.ariaLabel !== label) playButton.ariaLabel = label;
}
