// The canvas: the frame below, the paths over it, the points that move along them.

const find = (name) => element.querySelector(name);
const all = (name) => [...element.querySelectorAll(name)];
const canvas = find("canvas"), pen = canvas.getContext("2d");
const layer = document.createElement("canvas"), layerPen = layer.getContext("2d"); // the paths, drawn once for each change
const DOTS = 16; // along a path
const start = props.start;

let strokes = [], chosen = -1, draft = null, cursor = null; // `cursor`: the cross of the keyboard
let size = [1, 1], view = "paths";
let background = null, flow = null; // pictures: the first frame; the flow map's frames, one under the other
let making = null; // the first frame of a video that is being made
let compare = false, split = 0.5;
let stale = true, dirty = true, painted = -1, waiting = false; // the layer; the canvas; its frame; a picture is asked for

const samplesOf = new WeakMap(); // stroke -> `timed`, which is costly
function samples(stroke) {
  if (!samplesOf.has(stroke)) samplesOf.set(stroke, timed(stroke, size));
  return samplesOf.get(stroke);
}

const hue = (i) => `hsl(${((0.07 + i * 0.381966) % 1) * 360} 95% 62%)`;
const inPixels = ([x, y]) => [x * canvas.clientWidth, y * canvas.clientHeight];

// As large as the frame allows.
function fit() {
  const box = find(".frame"), ratio = window.devicePixelRatio || 1;
  const scale = Math.min(box.clientWidth / size[0], box.clientHeight / size[1]);
  const [width, height] = size.map((side) => Math.max(Math.floor(side * scale), 1));
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  find(".split").style.width = `${width}px`;
  for (const each of [canvas, layer]) [each.width, each.height] = [width, height].map((side) => Math.round(side * ratio));
  stale = true;
  paintAll(); // at once: a canvas of another size is empty
}

function redraw() { stale = true; paint(); }

function paint() {
  dirty = true;
  tick();
}

// Waits for the next picture on the screen; paints what has changed, and goes on while something plays.
function tick() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame((now) => {
    waiting = false;
    player.tick(now);
    if (dirty || player.frame !== painted) paintAll();
    if (player.playing) tick();
  });
}

function paintAll() {
  [dirty, painted] = [false, player.frame];
  const { width, height } = canvas;
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.imageSmoothingQuality = "high";
  paintGround(width, height);
  if (view === "paths") {
    if (stale) paintLayer();
    pen.drawImage(layer, 0, 0);
    pen.setTransform(width / canvas.clientWidth, 0, 0, height / canvas.clientHeight, 0, 0);
    if (draft) paintStroke(pen, draft, hue(strokes.length), true);
    const time = making ? 0 : player.time; // what is shown of it is the first frame
    strokes.forEach((stroke, i) => paintRunner(placeAt(samples(stroke), time), hue(i)));
    if (cursor) paintCross(cursor);
  }
  showTime();
}

function paintGround(width, height) {
  if (view === "flow" && flow) {
    const row = flow.height / flow.frames, at = Math.round(player.time * (flow.frames - 1));
    return pen.drawImage(flow, 0, at * row, flow.width, row, 0, 0, width, height);
  }
  const frame = making || (ready(player.video) ? player.video : background);
  pen.fillStyle = "#202126";
  pen.fillRect(0, 0, width, height);
  if (frame) pen.drawImage(frame, 0, 0, width, height);
  else paintGrid(width, height);
  if (compare && !making && ready(player.before)) {
    const at = Math.round(split * width);
    pen.save();
    pen.beginPath();
    pen.rect(0, 0, at, height);
    pen.clip();
    pen.drawImage(player.before, 0, 0, width, height);
    pen.restore();
    pen.fillStyle = "#fff";
    pen.fillRect(at - 1, 0, 2, height);
  }
}

function paintGrid(width, height) {
  pen.fillStyle = "#2b2c33";
  const step = Math.max(width, height) / 12;
  for (let x = step / 2; x < width; x += step) for (let y = step / 2; y < height; y += step) pen.fillRect(x - 1, y - 1, 3, 3);
}

function paintLayer() {
  stale = false;
  layerPen.setTransform(1, 0, 0, 1, 0, 0);
  layerPen.clearRect(0, 0, layer.width, layer.height);
  layerPen.setTransform(layer.width / canvas.clientWidth, 0, 0, layer.height / canvas.clientHeight, 0, 0);
  strokes.forEach((stroke, i) => paintStroke(layerPen, stroke, hue(i), i === chosen));
}

function line(on, points, color, width) {
  Object.assign(on, { strokeStyle: color, lineWidth: width, lineJoin: "round", lineCap: "round" });
  on.beginPath();
  points.forEach((p, i) => on[i ? "lineTo" : "moveTo"](...inPixels(p)));
  on.stroke();
}

function dot(on, point, radius, fill) {
  on.fillStyle = fill;
  on.beginPath();
  on.arc(...inPixels(point), radius, 0, 7);
  on.fill();
}

function paintStroke(on, stroke, color, strong) {
  if (stroke.points.length < 2) {
    if (stroke.points.length) dot(on, stroke.points[0], 5, color);
    return;
  }
  line(on, stroke.points, "rgba(0,0,0,.55)", strong ? 8 : 6);
  line(on, stroke.points, color, strong ? 4.5 : 3);
  const along = samples(stroke);
  for (let i = 1; i < DOTS; i++) dot(on, placeAt(along, i / DOTS), 2, "#fff");
  dot(on, stroke.points[0], 5, color);
  paintArrow(on, along, color);
  const share = shares(stroke.points, size);
  for (const pause of stroke.pauses) paintPause(on, between(pause.at, share, stroke.points));
  if (strong && stroke.control) stroke.control.forEach((p) => dot(on, p, 4.5, "#fff"));
}

function paintArrow(on, along, color) {
  const [b, a] = [along[along.length - 1], along[Math.max(along.length - 4, 0)]].map(inPixels);
  const angle = Math.atan2(b[1] - a[1], b[0] - a[0]);
  on.fillStyle = color;
  on.beginPath();
  for (const turn of [0, 2.5, -2.5]) on.lineTo(b[0] + 12 * Math.cos(angle + turn), b[1] + 12 * Math.sin(angle + turn));
  on.fill();
}

function paintPause(on, place) {
  dot(on, place, 8, "#fff");
  const [x, y] = inPixels(place);
  on.fillStyle = "#222";
  on.fillRect(x - 3.5, y - 4, 2.5, 8);
  on.fillRect(x + 1, y - 4, 2.5, 8);
}

// The point on the path at the frame that is shown.
function paintRunner(place, color) {
  dot(pen, place, 10, "#fff");
  dot(pen, place, 7.5, color);
}

function paintCross(place) {
  const [x, y] = inPixels(place);
  for (const [color, width] of [["#000", 4], ["#fff", 2]]) {
    Object.assign(pen, { strokeStyle: color, lineWidth: width });
    pen.beginPath();
    for (const [dx, dy] of [[10, 0], [0, 10]]) { pen.moveTo(x - dx, y - dy); pen.lineTo(x + dx, y + dy); }
    pen.stroke();
  }
}
