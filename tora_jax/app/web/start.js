// The page begins.

buildForm();
form.addEventListener("submit", (event) => { event.preventDefault(); run(); });
element.addEventListener("input", ({ target }) => { if (target.form === form && target.name !== "size") changed(); });
form.size.addEventListener("change", async () => {
  const strokesOf = strokes;
  resize();
  if (given["0"]) await refit();
  set(strokesOf === strokes ? strokes.map((each) => ({ ...each })) : strokes, chosen); // lengths have another measure
});
stopButton.addEventListener("click", async () => {
  find(".left").textContent = "it stops";
  await ask("cancel", { visit: await visit });
});

find(".examples .thumbs").append(...start.examples.map((each) => thumb(each.video, each.prompt, each.title, () => bringExample(each), form.size.value, each.trajectories)));

let begun = false;
watch("value", () => {
  const told = props.value || {};
  if (!told.visit || begun) return;
  begun = true;
  arrive(told.visit);
  if (told.error) say(`The link: ${told.error}`, true);
  if (told.asked) bringRequest(told.asked, told.drawn);
});

new ResizeObserver(fit).observe(find(".frame"));
resize();
if (start.examples.length) {
  bringExample(start.examples[0]);
  sample = true;
  past.length = 0;
}
player.play();
showTools();
