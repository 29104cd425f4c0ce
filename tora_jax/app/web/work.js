// The form, what goes to the server, and what comes back: progress, results, requests that are shared.

const LOOK = 400, SOON = 250, AGAIN = 3000; // milliseconds between looks at the server; after the last change; while it knows no time
const form = find(".ask"), runButton = find(".run"), stopButton = find(".stop");
const results = []; // of this visit, the latest first
let working = false, arrive, later = 0, refused = ""; // `refused`: why the request cannot be made
const visit = new Promise((resolve) => { arrive = resolve; });

function make(tag, attributes, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

// One of the server's functions; a fault of the line is an error like others.
async function ask(name, data) {
  try {
    return await server[name](data);
  } catch {
    return { error: "the server does not answer; is it still running?" };
  }
}

function say(text, wrong = false) {
  const status = find(".status");
  status.textContent = text;
  status.classList.toggle("wrong", wrong);
}

const address = (path) => `${window.gradio_config.root}${window.gradio_config.api_prefix || "/gradio_api"}/file=${path}`;
const inWords = (seconds) => seconds < 90 ? `about ${Math.max(Math.round(seconds), 1)} s` : `about ${Math.round(seconds / 60)} minutes`;

// ---------------------------------------------------------------- the form

function buildForm() {
  const names = { num_frames: "Frames", size: "Size" };
  const label = (name) => names[name] || (name[0].toUpperCase() + name.slice(1)).replaceAll("_", " ");
  const field = (name, help, input) => make("label", { title: help }, label(name), input, make("small", {}, help));
  const sizes = make("select", { name: "size" }, ...Object.keys(start.sizes).map((each) => new Option(each, each)));
  const last = start.lengths.length - 1;
  const length = make("input", { name: "frames", type: "range", min: 0, max: last, value: start.lengths.indexOf(start.num_frames) });
  const told = make("output", { className: "length" });
  const long = last > 0 && start.lengths[last] > start.segment ? `; over ${start.segment}: in segments` : "";
  find(".settings .fields").append(
    field("num_frames", `Number of frames, ${start.fps} a second${long}`, make("span", {}, length, told)),
    field("size", "Width and height in pixels", sizes),
    ...start.fields.map(({ name, help, value, range }) => {
      const kind = range ? { type: "number", min: range[0], max: range[1], step: range[2] } : { type: "text", maxLength: start.limits.text };
      return field(name, help, make("input", { name, value: value ?? "", ...kind }));
    }));
  for (const each of all(".settings [name]")) each.setAttribute("form", form.id); // they stand elsewhere on the page
  form.prompt.maxLength = start.limits.text;
  form.prompt.value = start.prompt;
}

const frames = () => start.lengths[Number(form.elements.frames.value)];

// What is asked for beside paths and files.
function asked() {
  const found = { prompt: form.prompt.value, size: form.size.value, num_frames: frames() };
  for (const { name, range } of start.fields) {
    const value = form.elements[name].value;
    if (value !== "") found[name] = range ? Number(value) : value;
  }
  return found;
}

const drawn = () => strokes.map(samples);
const paths = () => Object.fromEntries(Object.entries(given).map(([at, file]) => [at, file.path]));
const request = () => ({ drawn: drawn(), asked: asked(), given: paths() });

function fill(values) {
  const every = { prompt: "", ...Object.fromEntries(start.fields.map(({ name, value }) => [name, value ?? ""])), ...values };
  for (const [name, value] of Object.entries(every)) if (form.elements[name]) form.elements[name].value = value;
  const at = start.lengths.indexOf(values.num_frames ?? start.num_frames);
  form.elements.frames.value = at < 0 ? start.lengths.indexOf(start.num_frames) : at;
  resize();
}

function resize() {
  size = start.sizes[form.size.value];
  find(".length").textContent = `${frames()} (${round(frames() / start.fps, 1)} s)`;
  fit();
}

// ---------------------------------------------------------------- after each change

function changed() {
  find(".length").textContent = `${frames()} (${round(frames() / start.fps, 1)} s)`;
  if (!player.video) player.frames = frames();
  clearTimeout(later);
  later = setTimeout(preview, SOON);
}

// The flow map, and how long the video will take; an older answer than the last question is dropped.
async function preview() {
  const mine = later, told = await ask("preview", request());
  if (mine !== later) return;
  const about = find(".about");
  about.textContent = told.seconds ? inWords(told.seconds) : "";
  if (told.seconds === null && !start.needs_picture) later = setTimeout(preview, AGAIN); // soon the server has made a first one
  const before = refused;
  refused = told.refused || told.error || "";
  if (refused) return say(refused, true);
  if (before && find(".status").textContent === before) say("");
  const strip = new Image();
  strip.onload = () => { flow = Object.assign(strip, { frames: told.frames }); paint(); };
  strip.src = told.flow;
}

// ---------------------------------------------------------------- a video

async function run() {
  if (working) return;
  if (spline) endSpline();
  const wanted = { strokes, asked: asked(), given: { ...given } };
  const played = player.playing;
  player.pause(); // what plays takes time from a model on the same machine
  show(true);
  let told = await ask("begin", { visit: await visit, ...request() }), seen = 0;
  while (!told.error && !told.made && !told.failed) {
    showProgress(told);
    seen = Math.max(seen, told.picture ? told.pictures : 0);
    await new Promise((resolve) => setTimeout(resolve, LOOK));
    told = await ask("look", { visit: await visit, seen });
  }
  show(false);
  making = null;
  if (told.made) keep({ ...told.made, ...wanted });
  else say(told.error || told.failed, told.failed !== "cancelled");
  if (played) player.play();
  paint();
}

function show(busy) {
  working = busy;
  runButton.hidden = busy;
  stopButton.hidden = !busy;
  playThumbs(!busy);
  if (busy) showProgress({ place: 0, done: 0, total: 0 });
}

function showProgress({ place, done, total, left, picture }) {
  const begun = !total ? "it begins" : done < total ? `step ${done} of ${total}` : "the frames are decoded";
  const waits = place ? `${place} before you` : begun;
  find(".left").textContent = place === null && left ? `${waits}, ${inWords(left)} left` : waits;
  find(".done").style.width = `${total ? (100 * done) / total : 0}%`;
  if (!picture) return;
  const shown = new Image();
  shown.onload = () => { if (working) { making = shown; paint(); } };
  shown.src = picture;
}

// A result of this visit: it plays, and its thumb brings its request back.
function keep(made) {
  results.unshift(made);
  results.length = Math.min(results.length, start.limits.kept);
  showResult(made);
  find(".visit").hidden = false;
  find(".visit .thumbs").replaceChildren(...results.map((each, i) => thumb(each.video, each.asked.prompt,
    `Video ${results.length - i}: ${each.asked.prompt}`, () => bringResult(each), each.asked.size)));
}

function showResult(made) {
  const before = player.shown && player.shown !== made ? player.shown : results.find((each) => each !== made);
  sample = false;
  player.playing = true;
  player.show(address(made.video), made.asked.num_frames, start.fps, before ? address(before.video) : "");
  player.shown = made;
  find("[data-do=compare]").disabled = !before;
  if (!before && compare) ACTIONS.compare();
  say([made.error, `seed ${made.settings.seed}`, ...made.lost].filter(Boolean).join("; "));
  find(".links").replaceChildren(...made.files.map((path) => {
    const name = path.split("/").pop();
    return make("a", { href: address(path), download: name, title: `Download ${name}` }, name);
  }));
  showTools();
}

function showNothing() {
  player.show(null, frames(), start.fps);
  player.shown = null;
  if (compare) ACTIONS.compare();
  find("[data-do=compare]").disabled = true;
  find(".links").replaceChildren();
}

async function bringResult(made) {
  for (const at of Object.keys(given)) delete given[at];
  Object.assign(given, made.given);
  fill(made.asked);
  change(made.strokes, made.strokes.length - 1);
  window0 = null;
  showGiven();
  await refit();
  showResult(made);
}

// ---------------------------------------------------------------- examples and shared requests

const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;

// A small copy that plays, or the paths where there is no video.
function thumb(path, words, label, act, name, paths) {
  const small = path ? make("video", { src: address(path), muted: true, loop: true, playsInline: true, autoplay: !still }) : sketch(paths);
  small.style.aspectRatio = start.sizes[name].join("/"); // before it is loaded as after
  return make("button", { type: "button", title: words, ariaLabel: label, onclick: act }, small);
}

// They rest while one draws, and while the video is made, which needs the machine.
function playThumbs(on) {
  for (const each of all(".thumbs video")) if (on && !still) each.play().catch(() => {}); else each.pause(); // not loaded yet: it stays still
}

function bringRequest(values, lines) {
  showNothing();
  fill(values);
  change(lines.map((points) => strokeOf(points, size)).filter(Boolean), lines.length - 1);
}

function bringExample(example) {
  const { prompt, seed, trajectories, video } = example;
  bringRequest({ prompt, seed, size: Object.keys(start.sizes)[0] }, trajectories);
  if (!video) return;
  player.playing = !still;
  player.show(address(video), start.num_frames, start.fps);
}

// The request as a line of a batch file, its paths thinned to a thousandth of the frame.
function shared() {
  const { size: name, ...settings } = asked(), [width, height] = start.sizes[name];
  for (const { name: field, value } of start.fields) if (settings[field] === value) delete settings[field];
  const lines = drawn().map((points) => thinned(points, 0.001).map((p) => p.map((v) => round(v, 4))));
  return { ...settings, width, height, seed: Number(form.seed.value), trajectories: { canvas: [1, 1], trajectories: lines } };
}

function save(name, data) {
  const href = URL.createObjectURL(new Blob([JSON.stringify(data)], { type: "application/json" }));
  make("a", { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
}

Object.assign(ACTIONS, {
  save() { save("request.json", shared()); },
  export() { save("trajectories.json", { canvas: [1, 1], trajectories: drawn() }); },
  async link() {
    const link = `${location.origin}${location.pathname}?${new URLSearchParams({ request: JSON.stringify(shared()) })}`;
    if (link.length > 16000) return say("the paths are too long for a link; save the request as a file", true);
    try {
      await navigator.clipboard.writeText(link);
      say("The link is copied: it holds the request, without pictures.");
    } catch {
      window.prompt("The link, to copy:", link); // no clipboard without https
    }
  },
});
