// What is dropped, pasted or opened: a photo, a clip, a file of paths, a request; each taken for what it is.

const given = {}; // "0" and "-1" (first and last frame) -> {path, name, kind}
const dialog = find(".choose"), picker = find(".picker");
let window0 = null; // what the crop leaves of the first frame: left, top, right, bottom in 0..1
let unread = null; // {path, name} of the file that the dialog is about

async function bring(file) {
  say(`Reading ${file.name} ...`);
  try {
    const { path } = await upload(file);
    await take({ path, name: file.name });
  } catch (error) {
    say(/413|size/i.test(String(error)) ? `${file.name} is too large; 50 MB are the most` : `${file.name} did not arrive; try again`, true);
  }
}

async function take(file, said) {
  const asked = { ...file, said, size: form.size.value, num_frames: frames(), picture: given["0"]?.path };
  const found = await ask("read", asked);
  if (found.error && !/\.(png|jpe?g|webp|bmp|gif|mp4|webm|mov)$/i.test(file.name)) return chooseReading(file, [], found.error);
  if (found.error) return say(found.error, true);
  if (found.kind === "request") return bringRequest(found.asked, found.drawn);
  if (found.kind !== "paths") return give(file, found);
  if (found.readings.length > 1) return chooseReading(file, found.readings, "can be read in several ways");
  takeReading(found.readings[0]);
}

function takeReading(reading) {
  dialog.close();
  addAll(reading.paths);
  say(reading.line);
}

// A picture is the first frame, a clip goes on; a second one is for the end.
function give(file, found) {
  const at = given["0"] && !given["-1"] ? "-1" : "0";
  given[at] = { ...file, kind: found.kind };
  if (at === "0") showFirst(found);
  showGiven();
  say(`${file.name}: ${ROLES[found.kind][at]}`);
  changed();
}

const ROLES = {
  picture: { 0: "the first frame", "-1": "the last frame" },
  clip: { 0: "the video goes on from it", "-1": "the video leads up to it" },
};

// What the model will see of the first frame; strokes stay where they are on it.
function showFirst(found) {
  if (sample) ownVideo();
  if (window0 && found) strokes = strokes.map((stroke) => follow(stroke, window0, found.seen));
  window0 = found ? found.seen : null;
  background = null;
  if (found) {
    const picture = new Image();
    picture.onload = () => { background = picture; paint(); };
    picture.src = found.background;
  }
  redraw();
}

function showGiven() {
  find(".given").replaceChildren(...Object.entries(given).map(([at, file]) => {
    const other = at === "0" ? "-1" : "0";
    return make("span", { className: "chip" }, `${file.name}: ${ROLES[file.kind][at]}`,
      make("button", { type: "button", title: ROLES[file.kind][other], onclick: () => swap(at, other) }, at === "0" ? "to the end" : "to the start"),
      make("button", { type: "button", ariaLabel: `Remove ${file.name}`, onclick: () => swap(at) }, "×"));
  }));
}

async function swap(at, other) {
  const file = given[at];
  if (other && given[other]) given[at] = given[other];
  else delete given[at];
  if (other) given[other] = file;
  window0 = null; // another picture: paths stay where they are in the frame
  showGiven();
  await refit();
  changed();
}

// The first frame again: another size, or another file.
async function refit() {
  const first = given["0"];
  const found = first ? await ask("read", { ...first, size: form.size.value, num_frames: frames() }) : null;
  if (found?.error) return say(found.error, true);
  showFirst(found);
}

// ---------------------------------------------------------------- several readings

function chooseReading(file, readings, what) {
  unread = file;
  find("#tora-choose").textContent = what.startsWith(file.name) ? what : `${file.name} ${what}`;
  find(".ways").replaceChildren(...readings.map((reading) =>
    make("button", { type: "button", onclick: () => takeReading(reading) }, sketch(reading.paths), reading.line)));
  find(".said").open = !readings.length;
  say("");
  if (!dialog.open) dialog.showModal();
}

// Paths, small.
function sketch(paths) {
  const small = make("canvas", { width: 144, height: Math.round((144 * size[1]) / size[0]) }), on = small.getContext("2d");
  on.fillStyle = "#202126";
  on.fillRect(0, 0, small.width, small.height);
  paths.forEach((points, i) => {
    Object.assign(on, { strokeStyle: hue(i), lineWidth: 2 });
    on.beginPath();
    points.forEach((p, k) => on[k ? "lineTo" : "moveTo"](p[0] * small.width, p[1] * small.height));
    on.stroke();
  });
  return small;
}

Object.assign(ACTIONS, {
  open() { picker.click(); },
  close() { dialog.close(); },
  again() {
    const said = Object.fromEntries([...dialog.querySelectorAll("[name]")].map((field) => [field.name, field.value]));
    take(unread, said);
  },
});

picker.addEventListener("change", async () => {
  for (const file of [...picker.files]) await bring(file);
  picker.value = "";
});
element.addEventListener("dragover", (event) => { event.preventDefault(); element.classList.add("over"); });
element.addEventListener("dragleave", (event) => { if (!element.contains(event.relatedTarget)) element.classList.remove("over"); });
element.addEventListener("drop", async (event) => {
  event.preventDefault();
  element.classList.remove("over");
  for (const file of [...event.dataTransfer.files]) await bring(file);
});
document.addEventListener("paste", async (event) => {
  const files = [...event.clipboardData.files], text = event.clipboardData.getData("text/plain");
  if (!files.length && (!text || event.target.matches?.("input, textarea"))) return;
  event.preventDefault();
  for (const file of files.length ? files : [new File([text], "pasted.txt")]) await bring(file);
});
