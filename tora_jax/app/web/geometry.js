// Strokes in 0..1 of the frame, and what the server is told of them: [x, y, t] with t in 0..1 of the video.
//
// A stroke is never changed, only replaced: {points: [[x, y], ...], times: [0..1, ...] or null,
//   control: [[x, y], ...] or null, speed, pauses: [{at: share of the length, rest: share of the time}]}

const clamp = (v, low = 0, high = 1) => Math.min(Math.max(v, low), high);
const distance = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]);
const round = (v, digits) => Math.round(v * 10 ** digits) / 10 ** digits;

// How far along the path each point is, 0..1; lengths are on a canvas of the given width and height.
function shares(points, [width, height]) {
  const sums = [0];
  const place = ([x, y]) => [x * width, y * height];
  for (let i = 1; i < points.length; i++) sums.push(sums[i - 1] + distance(place(points[i - 1]), place(points[i])));
  const total = sums[sums.length - 1] || 1;
  return sums.map((s) => s / total);
}

// Linear interpolation of numbers or points `ys` over rising `xs`.
function between(at, xs, ys) {
  let i = 1;
  while (i < xs.length - 1 && xs[i] < at) i++;
  const gap = xs[i] - xs[i - 1];
  const part = gap > 0 ? clamp((at - xs[i - 1]) / gap) : 0;
  const mix = (a, b) => a + part * (b - a);
  return Array.isArray(ys[0]) ? ys[i].map((v, k) => mix(ys[i - 1][k], v)) : mix(ys[i - 1], ys[i]);
}

// When a share of the path has been travelled, without pauses: the inverse of the easing.
const EASING = {
  even: (s) => s,
  in: (s) => Math.sqrt(s),
  out: (s) => 1 - Math.sqrt(1 - s),
  both: (s) => Math.acos(1 - 2 * s) / Math.PI,
};

// The stroke as the server gets it: every point that was drawn, and so many more that easing shows, with rising times.
function timed(stroke, size) {
  const along = shares(stroke.points, size);
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
    const xy = between(s, along, stroke.points).map((v) => clamp(v));
    const rested = pauses.filter((p) => p.at < s).reduce((sum, p) => sum + p.rest, 0);
    const t = when(s) * (1 - resting) + rested;
    add(xy, t);
    const here = pauses.filter((p) => p.at === s).reduce((sum, p) => sum + p.rest, 0);
    if (here) add(xy, t + here);
  }
  return out.map((p) => p.map((v) => round(v, 6)));
}

// Catmull-Rom through the control points.
function curve(control) {
  if (control.length < 3) return control.map((p) => [...p]);
  const out = [], at = (i) => control[clamp(i, 0, control.length - 1)];
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

// Points [x, y] or [x, y, t] of a file -> a stroke with their own speed; null where nothing moves.
function strokeOf(points, size) {
  const xy = points.map((p) => [p[0], p[1]]);
  const times = points.map((p, i) => (p.length > 2 ? p[2] : i / (points.length - 1)));
  const pauses = [], along = shares(xy, size);
  const kept = xy.map((_, i) => i).filter((i) => i === 0 || along[i] > along[i - 1]);
  if (kept.length < 2) return null;
  let rested = 0;
  const moving = kept.map((i, k) => {
    const next = k + 1 < kept.length ? kept[k + 1] - 1 : xy.length - 1; // equal points up to here: a pause
    const at = times[i] - rested;
    if (next > i) { pauses.push({ at: along[i], rest: times[next] - times[i] }); rested += times[next] - times[i]; }
    return at;
  });
  const span = moving[moving.length - 1] - moving[0];
  if (times[0] > 0) pauses.push({ at: 0, rest: times[0] });
  if (times[times.length - 1] < 1) pauses.push({ at: 1, rest: 1 - times[times.length - 1] });
  return { points: kept.map((i) => xy[i]), times: moving.map((t) => (t - moving[0]) / (span || 1)), control: null, pauses, speed: "drawn" };
}

// Another size crops the photo otherwise: a stroke stays where it is on the photo. Windows are left, top, right, bottom.
function follow(stroke, from, to) {
  const along = (v, k) => (from[k] + v * (from[k + 2] - from[k]) - to[k]) / (to[k + 2] - to[k]);
  const moved = (points) => points && points.map(([x, y]) => [along(x, 0), along(y, 1)]);
  return { ...stroke, points: moved(stroke.points), control: moved(stroke.control) };
}

// Fewer points, none further than `slack` from the path they leave (Douglas and Peucker), times included.
function thinned(points, slack) {
  if (points.length < 3) return points;
  const first = points[0], last = points[points.length - 1];
  let worst = 0, index = 0;
  for (let i = 1; i < points.length - 1; i++) {
    const part = (points[i][2] - first[2]) / (last[2] - first[2] || 1);
    const far = distance(points[i], first.map((v, k) => v + part * (last[k] - v)));
    if (far > worst) [worst, index] = [far, i];
  }
  if (worst <= slack) return [first, last];
  return [...thinned(points.slice(0, index + 1), slack).slice(0, -1), ...thinned(points.slice(index), slack)];
}

// The place of a point on its path (of `timed`) at a share of the video's time.
const placeAt = (samples, t) => between(t, samples.map((p) => p[2]), samples);
