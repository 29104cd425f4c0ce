// The canvas: strokes in 0..1 of the frame, and what the server is told of them, [x, y, t] with t in 0..1 of the video.
//
// A stroke: {points: [[x, y], ...], times: [0..1, ...] or null, control: [[x, y], ...] or null, kind, speed,
//            pauses: [{at: share of the length, rest: share of the time}]}
const canvas = element.querySelector("canvas");
const pen = canvas.getContext("2d");
const hint = element.querySelector(".hint");
const speedMenu = element.querySelector("[data-speed]");
const presetMenu = element.querySelector("[data-preset]");
const DOTS = 16, REST = 0.15, MOST_REST = 0.75, NEAR = 14; // dots along a path; share of a pause; pixels of a finger
let strokes = [], chosen = -1, tool = "free", before = [], drag = null, spline = null;
let background = null, aspect = [1, 1];
let photo = "", seen = null; // the first frame, and what the crop leaves of it: left, top, right, bottom in 0..1

// ---------------------------------------------------------------- geometry and time

const clamp = (v) => Math.min(Math.max(v, 0), 1);
const inPixels = ([x, y]) => [x * canvas.clientWidth, y * canvas.clientHeight];
const distance = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]);
const lengthOf = (a, b) => distance([a[0] * aspect[0], a[1] * aspect[1]], [b[0] * aspect[0], b[1] * aspect[1]]);

// How far along the path each point is, 0..1.
function shares(points) {
  const sums = [0];
  for (let i = 1; i < points.length; i++) sums.push(sums[i - 1] + lengthOf(points[i - 1], points[i]));
  const total = sums[sums.length - 1] || 1;
  return sums.map((s) => s / total);
}

function between(at, xs, ys) {
  let i = 1;
  while (i < xs.length - 1 && xs[i] < at) i++;
  const gap = xs[i] - xs[i - 1];
  const part = gap > 0 ? clamp((at - xs[i - 1]) / gap) : 0;
  return Array.isArray(ys[0])
    ? ys[i].map((v, k) => ys[i - 1][k] + part * (v - ys[i - 1][k]))
    : ys[i - 1] + part * (ys[i] - ys[i - 1]);
}

// When a share of the path has been travelled, without pauses: the inverse of the easing.
const EASING = {
  even: (s) => s,
  in: (s) => Math.sqrt(s),
  out: (s) => 1 - Math.sqrt(1 - s),
  both: (s) => Math.acos(1 - 2 * s) / Math.PI,
};

// The stroke as the server gets it: every point that was drawn, and so many more that easing shows, with rising times.
function timed(stroke) {
  const along = shares(stroke.points);
  const drawn = stroke.speed === "drawn" && stroke.times;
  const when = drawn ? (s) => between(s, along, stroke.times) : EASING[stroke.speed] || EASING.even;
  const pauses = [...stroke.pauses].sort((a, b) => a.at - b.at);
  const resting = pauses.reduce((sum, p) => sum + p.rest, 0);
  const at = new Set([...along, ...pauses.map((p) => p.at)]);
  if (!drawn && stroke.speed !== "even") for (let i = 1; i < 32; i++) at.add(i / 32);
  const out = [];
  const add = (xy, t) => {
    t = Math.min(t, 1);
    if (!out.length || t > out[out.length - 1][2] + 1e-6) out.push([...xy, t]);
    else out[out.length - 1] = [...xy, out[out.length - 1][2]];
  };
  for (const s of [...at].sort((a, b) => a - b)) {
    const xy = between(s, along, stroke.points).map(clamp);
    const rested = pauses.filter((p) => p.at < s).reduce((sum, p) => sum + p.rest, 0);
    const t = when(s) * (1 - resting) + rested;
    add(xy, t);
    const here = pauses.filter((p) => p.at === s).reduce((sum, p) => sum + p.rest, 0);
    if (here) add(xy, t + here);
  }
  return out;
}

function curve(control) {
  if (control.length < 3) return control.map((p) => [...p]);
  const out = [], at = (i) => control[Math.min(Math.max(i, 0), control.length - 1)];
  for (let i = 0; i < control.length - 1; i++) {
    const [a, b, c, d] = [at(i - 1), at(i), at(i + 1), at(i + 2)];
    for (let k = 0; k < 16; k++) {
      const u = k / 16;
      out.push([0, 1].map((n) => clamp(0.5 * (2 * b[n] + (c[n] - a[n]) * u +
        (2 * a[n] - 5 * b[n] + 4 * c[n] - d[n]) * u * u + (3 * b[n] - a[n] - 3 * c[n] + d[n]) * u * u * u))));
    }
  }
  out.push([...control[control.length - 1]]);
  return out;
}

// ---------------------------------------------------------------- drawing

const hue = (i) => `hsl(${((0.02 + i * 0.381966) % 1) * 360} 90% 60%)`;

function paint() {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = (width * aspect[1]) / aspect[0];
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  if (background) pen.drawImage(background, 0, 0, width, height);
  strokes.forEach((stroke, i) => paintStroke(stroke, hue(i), i === chosen));
  if (drag && drag.draft) paintStroke(drag.draft, hue(strokes.length), true);
  if (spline) paintStroke({ ...spline, points: curve(spline.control) }, hue(strokes.length), true);
  speedMenu.disabled = chosen < 0;
  if (chosen >= 0) speedMenu.value = strokes[chosen].speed;
  speedMenu.querySelector("[value=drawn]").disabled = chosen >= 0 && !strokes[chosen].times;
  const count = strokes.length;
  hint.textContent = count ? `${count} path${count > 1 ? "s" : ""}; dots lie equal times apart` : "Draw where things shall go";
}

function line(points, color, width) {
  pen.strokeStyle = color;
  pen.lineWidth = width;
  pen.lineJoin = pen.lineCap = "round";
  pen.beginPath();
  points.forEach((p, i) => pen[i ? "lineTo" : "moveTo"](...inPixels(p)));
  pen.stroke();
}

function dot(point, radius, fill) {
  pen.fillStyle = fill;
  pen.beginPath();
  pen.arc(...inPixels(point), radius, 0, 7);
  pen.fill();
}

function paintStroke(stroke, color, strong) {
  if (stroke.points.length < 2) {
    if (stroke.points.length) dot(stroke.points[0], 5, color);
    return;
  }
  line(stroke.points, "rgba(0,0,0,.6)", strong ? 7 : 5);
  line(stroke.points, color, strong ? 4 : 2.5);
  const samples = timed({ pauses: [], speed: "even", ...stroke });
  const times = samples.map((p) => p[2]);
  for (let i = 1; i < DOTS; i++) dot(between(i / DOTS, times, samples), 2.2, "#fff");
  dot(stroke.points[0], 6, color);
  const [b, a] = [samples[samples.length - 1], samples[Math.max(samples.length - 4, 0)]].map(inPixels);
  const angle = Math.atan2(b[1] - a[1], b[0] - a[0]);
  pen.fillStyle = color;
  pen.beginPath();
  for (const turn of [0, 2.5, -2.5]) pen.lineTo(b[0] + 11 * Math.cos(angle + turn), b[1] + 11 * Math.sin(angle + turn));
  pen.fill();
  const along = shares(stroke.points);
  for (const pause of stroke.pauses || []) {
    const place = between(pause.at, along, stroke.points);
    dot(place, 8, "#fff");
    const [x, y] = inPixels(place);
    pen.fillStyle = "#222";
    pen.fillRect(x - 3.5, y - 4, 2.5, 8);
    pen.fillRect(x + 1, y - 4, 2.5, 8);
  }
  if (strong && stroke.control) stroke.control.forEach((p) => dot(p, 4, "#fff"));
}

// ---------------------------------------------------------------- changes

const remember = () => { before.push(JSON.stringify(strokes)); if (before.length > 100) before.shift(); };

function changed() {
  chosen = Math.min(chosen, strokes.length - 1);
  paint();
  props.value = { trajectories: strokes.map((s) => timed(s).map((p) => p.map((v) => Math.round(v * 1e6) / 1e6))) };
  trigger("input");
}

function add(stroke) {
  remember();
  strokes.push({ times: null, control: null, pauses: [], speed: "even", ...stroke });
  chosen = strokes.length - 1;
  changed();
}

function nearest(place) {
  let best = { index: -1, far: NEAR };
  strokes.forEach((stroke, index) => {
    const along = shares(stroke.points);
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
  const pixels = [event.clientX - box.left - canvas.clientLeft, event.clientY - box.top - canvas.clientTop];
  return { pixels, point: [clamp(pixels[0] / canvas.clientWidth), clamp(pixels[1] / canvas.clientHeight)] };
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  event.preventDefault();
  canvas.focus();
  canvas.setPointerCapture(event.pointerId);
  const { pixels, point } = where(event);
  if (tool === "free" || tool === "line") {
    drag = { draft: { points: [point] }, clock: [performance.now()] };
  } else if (tool === "spline") {
    const last = spline && spline.control[spline.control.length - 1];
    if (last && distance(inPixels(last), pixels) < NEAR) return endSpline();
    spline = spline || { control: [] };
    spline.control.push(point);
  } else {
    const found = nearest(pixels);
    chosen = found.index;
    if (chosen >= 0 && tool === "pause") {
      remember();
      const stroke = strokes[chosen];
      const rest = Math.min(REST, MOST_REST - stroke.pauses.reduce((sum, p) => sum + p.rest, 0));
      const old = stroke.pauses.find((p) => Math.abs(p.at - found.at) < 0.04);
      if (rest > 0.01 && old) old.rest += rest;
      else if (rest > 0.01) stroke.pauses.push({ at: clamp(found.at), rest });
      return changed();
    }
    if (chosen >= 0) {
      const control = strokes[chosen].control;
      const corner = control ? control.findIndex((p) => distance(inPixels(p), pixels) < NEAR) : -1;
      drag = { from: point, corner, old: JSON.stringify(strokes), copy: JSON.parse(JSON.stringify(strokes[chosen])) };
    }
  }
  paint();
});

canvas.addEventListener("pointermove", (event) => {
  if (!drag) return;
  event.preventDefault();
  if (drag.draft) {
    for (const each of tool === "free" && event.getCoalescedEvents ? event.getCoalescedEvents() : [event]) {
      const { point } = where(each);
      const points = drag.draft.points;
      if (tool === "line") points[1] = point;
      else if (distance(inPixels(point), inPixels(points[points.length - 1])) >= 1) {
        points.push(point);
        drag.clock.push(performance.now());
      }
    }
    if (tool === "line") drag.draft.points[1] = where(event).point;
  } else {
    const { point } = where(event);
    const stroke = strokes[chosen], shift = [point[0] - drag.from[0], point[1] - drag.from[1]];
    if (drag.corner >= 0) {
      stroke.control[drag.corner] = point;
      stroke.points = curve(stroke.control);
    } else {
      for (const n of [0, 1]) { // the whole stays inside
        const values = drag.copy.points.map((p) => p[n]);
        shift[n] = Math.min(Math.max(shift[n], -Math.min(...values)), 1 - Math.max(...values));
      }
      const moved = (list) => list && list.map((p) => [clamp(p[0] + shift[0]), clamp(p[1] + shift[1])]);
      stroke.points = moved(drag.copy.points);
      stroke.control = moved(drag.copy.control);
    }
  }
  paint();
});

function release() {
  const done = drag;
  drag = null;
  if (!done) return;
  if (!done.draft) {
    if (done.old !== JSON.stringify(strokes)) { before.push(done.old); changed(); }
    return paint();
  }
  const { points } = done.draft;
  const long = points.slice(1).reduce((sum, p, i) => sum + distance(inPixels(p), inPixels(points[i])), 0);
  if (points.length < 2 || long < 4) return paint();
  if (tool === "line") return add({ kind: "line", points, control: points.map((p) => [...p]) });
  const [first, last] = [done.clock[0], done.clock[done.clock.length - 1]];
  add({ kind: "free", points, times: done.clock.map((t) => (t - first) / (last - first || 1)) });
}
canvas.addEventListener("pointerup", release);
canvas.addEventListener("pointercancel", () => { drag = null; paint(); });

function endSpline() {
  const control = spline && spline.control;
  spline = null;
  if (control && control.length > 1) add({ kind: "spline", control, points: curve(control) });
  else paint();
}

const ACTIONS = {
  delete() { if (chosen >= 0) { remember(); strokes.splice(chosen, 1); chosen = strokes.length - 1; changed(); } },
  undo() {
    if (spline) { spline.control.pop(); if (!spline.control.length) spline = null; return paint(); }
    if (before.length) { strokes = JSON.parse(before.pop()); chosen = strokes.length - 1; changed(); }
  },
  clear() { spline = null; if (strokes.length) { remember(); strokes = []; } changed(); },
  export() {
    const text = JSON.stringify({ canvas: [1, 1], trajectories: strokes.map(timed) });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "trajectories.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  },
};

element.querySelectorAll("[data-tool]").forEach((button) => button.addEventListener("click", () => {
  if (spline) endSpline();
  tool = button.dataset.tool;
  element.querySelectorAll("[data-tool]").forEach((b) => b.setAttribute("aria-pressed", String(b === button)));
}));
element.querySelectorAll("[data-do]").forEach((b) => b.addEventListener("click", () => ACTIONS[b.dataset.do]()));
canvas.addEventListener("dblclick", () => { if (spline) endSpline(); });
canvas.addEventListener("keydown", (event) => {
  if (event.key === "Delete" || event.key === "Backspace") ACTIONS.delete();
  else if (event.key === "z" && (event.ctrlKey || event.metaKey)) ACTIONS.undo();
  else if (event.key === "Enter" || event.key === "Escape") endSpline();
  else return;
  event.preventDefault();
});
speedMenu.addEventListener("change", () => {
  if (chosen >= 0) { remember(); strokes[chosen].speed = speedMenu.value; changed(); }
});
for (const name of Object.keys(props.presets || {})) presetMenu.add(new Option(name, name));
presetMenu.addEventListener("change", () => {
  for (const points of props.presets[presetMenu.value] || []) take(points);
  presetMenu.value = "";
});

// Points [x, y] or [x, y, t] from a file or a preset, as a stroke with their own speed.
function take(points) {
  const xy = points.map((p) => [p[0], p[1]]);
  const times = points.map((p, i) => (p.length > 2 ? p[2] : i / (points.length - 1)));
  const pauses = [], along = shares(xy);
  const kept = xy.map((_, i) => i).filter((i) => i === 0 || along[i] > along[i - 1]);
  let rested = 0;
  const moving = kept.map((i, k) => {
    const next = k + 1 < kept.length ? kept[k + 1] - 1 : xy.length - 1; // equal points up to here: a pause
    const at = times[i] - rested;
    if (next > i) { pauses.push({ at: along[i], rest: times[next] - times[i] }); rested += times[next] - times[i]; }
    return at;
  });
  const span = moving[moving.length - 1] - moving[0];
  if (kept.length < 2) return;
  if (times[0] > 0) pauses.push({ at: 0, rest: times[0] });
  if (times[times.length - 1] < 1) pauses.push({ at: 1, rest: 1 - times[times.length - 1] });
  add({ kind: "free", points: kept.map((i) => xy[i]), times: moving.map((t) => (t - moving[0]) / (span || 1)), pauses, speed: "drawn" });
}

// Another size crops the photo otherwise: what is drawn stays where it is on the photo.
function follow(from, to) {
  const along = (v, k) => (from[k] + v * (from[k + 2] - from[k]) - to[k]) / (to[k + 2] - to[k]);
  const moved = (points) => points && points.map(([x, y]) => [along(x, 0), along(y, 1)]);
  const all = (list) => list.map((s) => ({ ...s, points: moved(s.points), control: moved(s.control) }));
  strokes = all(strokes);
  before = before.map((text) => JSON.stringify(all(JSON.parse(text))));
  if (spline) spline.control = moved(spline.control);
}

// What the server sends: {add: trajectories}, {background: address or null, of: the photo, seen: what the crop leaves
// of it}, {size: [width, height]}.
watch("value", () => {
  const told = props.value || {};
  if (told.size) aspect = told.size;
  if ("background" in told) {
    if (seen && told.seen && told.of === photo) follow(seen, told.seen);
    [photo, seen] = [told.of, told.seen];
    background = null;
    if (told.background) {
      const picture = new Image();
      picture.onload = () => { background = picture; paint(); };
      picture.src = told.background;
    }
  }
  (told.add || []).forEach(take);
  if (told.size || "background" in told || told.add) changed();
});
if (props.size) aspect = props.size;
new ResizeObserver(paint).observe(canvas.parentElement);
paint();
