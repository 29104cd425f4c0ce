"""The page itself: what stands where, and which of `Studio`'s functions answers."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np

from tora_jax.app.studio import LONGEST, MOST_STEPS, MOST_TEXT, CancelledError, Made, Studio
from tora_jax.conditioning import trajectory
from tora_jax.configs import sampling
from tora_jax.errors import UserError

HERE = Path(__file__).parent
CSS = """
.gradio-container { max-width: 1200px !important; }
#run { min-height: 48px; }
#preview img { width: 160px; border-radius: 8px; border: 1px solid var(--border-color-primary); }
footer { display: none !important; }
@media (max-width: 640px) { .gradio-container { padding: 8px !important; } }
"""
PICTURES, CLIPS = ["image"], ["image", "video"]
SMALL = {"height": 110, "min_width": 130}  # a field for files


@contextmanager
def shown() -> Iterator[None]:
    """A mistake of the person is shown as text, whatever is in it."""
    try:
        yield
    except UserError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from None


class Drawing(NamedTuple):
    """What stands on the left: where paths are drawn, and files for it."""

    canvas: gr.HTML
    first: gr.File
    paths: gr.File
    reading: Mapping[str, gr.components.Component]
    preview: gr.HTML


class Form(NamedTuple):
    """What stands on the right: the settings by name, files for the other frames, and the buttons."""

    settings: Mapping[str, gr.components.Component]
    last: gr.File
    start: gr.File
    end: gr.File
    run: gr.Button
    stop: gr.Button
    status: gr.Textbox


class Results(NamedTuple):
    """What stands below: the last video, its files, and what was made in this visit."""

    video: gr.Video
    overlay: gr.Video
    motion_map: gr.Video
    files: gr.File
    gallery: gr.Gallery


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio."""
    gr.set_static_paths(studio.folder)  # `delete_cache` is for uploads; results go with their visit
    with gr.Blocks(title="Tora", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# Tora\nDraw where things shall go, say what they are, and get a video.")
        with gr.Row():
            drawing = _drawing(studio)
            form = _form(studio)
        results = _results()
        _connect_drawing(page, studio, drawing, form)
        _connect_generation(page, studio, drawing, form, results)
    return page.queue(max_size=50, default_concurrency_limit=4)


# ----------------------------------------------------------------------------------------------------------
# What stands where
# ----------------------------------------------------------------------------------------------------------


def _drawing(studio: Studio) -> Drawing:
    with gr.Column(min_width=300):
        canvas = gr.HTML(
            {"trajectories": []},
            html_template=(HERE / "canvas.html").read_text(),
            css_template=(HERE / "canvas.css").read_text(),
            js_on_load=(HERE / "canvas.js").read_text(),
            elem_id="canvas",
            presets=_presets(),
            size=list(reversed(next(iter(studio.sizes.values())))),
        )
        with gr.Row():
            first = gr.File(label="First frame", file_types=PICTURES, elem_id="first", **SMALL)
            paths = gr.File(label="Import paths", elem_id="import", **SMALL)
        reading = _reading()
        preview = gr.HTML(_picture(""), elem_id="preview")
    return Drawing(canvas, first, paths, reading, preview)


def _reading() -> dict[str, gr.components.Component]:
    """How an imported file is to be read, by setting."""
    with gr.Accordion("How to read a file of paths", open=False), gr.Row():
        canvas = gr.Textbox(label="trajectory_canvas", placeholder="720x480, 1x1, image", min_width=130)
        axes = gr.Textbox(label="trajectory_axes", placeholder="nt, tn, tnyx, up", min_width=130)
        times = gr.Dropdown(["points", "frames"], value="points", label="trajectory_times", min_width=130)
        tracks = gr.Textbox(label="trajectory_tracks", placeholder="0,3,7", min_width=130)
    return dict(zip(sampling.READING, (canvas, axes, times, tracks), strict=True))


def _form(studio: Studio) -> Form:
    own = studio.defaults
    with gr.Column(min_width=300):
        prompt = gr.Textbox(own.prompt, label="Prompt", lines=2, max_length=MOST_TEXT, elem_id="prompt")
        with gr.Row():
            frames = gr.Slider(
                min(5, own.segment),
                LONGEST * own.segment,
                own.num_frames,
                step=1,
                label="Frames",
                info=f"over {own.segment}: in segments",
                min_width=130,
            )
            sizes = gr.Dropdown(list(studio.sizes), value=next(iter(studio.sizes)), label="Size", min_width=130)
        with gr.Row():
            guidance = gr.Slider(1, 15, own.guidance, step=0.5, label="Guidance", min_width=130)
            weight = gr.Slider(1, 8, own.trajectory_guidance, step=0.5, label="Trajectory weight", min_width=130)
        with gr.Row():
            seed = gr.Number(own.seed, label="Seed", precision=0, minimum=0, min_width=130)
            steps = gr.Slider(1, MOST_STEPS, own.steps, step=1, label="Steps", min_width=130)
        with gr.Accordion("More", open=False):
            negative = gr.Textbox(label="Negative prompt", max_length=MOST_TEXT)
            with gr.Row():
                look = gr.Number(None, label="Aesthetic score", min_width=100)
                motion = gr.Number(None, label="Motion score", min_width=100)
                camera = gr.Textbox(label="Camera motion", placeholder="static, pan left ...", min_width=130)
            with gr.Row():
                last = gr.File(label="Last frame", file_types=PICTURES, **SMALL)
                start = gr.File(label="Clip to go on from", file_types=CLIPS, **SMALL)
                end = gr.File(label="Clip to lead up to", file_types=CLIPS, **SMALL)
        with gr.Row():
            run = gr.Button("Generate", variant="primary", elem_id="run", min_width=130)
            stop = gr.Button("Cancel", elem_id="stop", min_width=100)
        status = gr.Textbox("", label="", show_label=False, interactive=False, elem_id="status", lines=2)
    settings = {
        "prompt": prompt,
        "num_frames": frames,
        "size": sizes,
        "guidance": guidance,
        "trajectory_guidance": weight,
        "seed": seed,
        "steps": steps,
        "negative_prompt": negative,
        "aesthetic_score": look,
        "motion_score": motion,
        "camera_motion": camera,
    }
    return Form(settings, last, start, end, run, stop, status)


def _results() -> Results:
    with gr.Row():
        options = {"autoplay": True, "loop": True, "interactive": False, "min_width": 220, "height": 280}
        video = gr.Video(label="Video", elem_id="video", **options)
        overlay = gr.Video(label="With its paths", elem_id="overlay", **options)
        motion_map = gr.Video(label="Flow map", elem_id="flow", **options)
    with gr.Row():
        files = gr.File(label="Download", file_count="multiple", interactive=False, min_width=220, height=160)
        gallery = gr.Gallery(
            label="This visit",
            columns=4,
            interactive=False,
            min_width=220,
            height=240,
            object_fit="contain",
            elem_id="gallery",
        )
    return Results(video, overlay, motion_map, files, gallery)


# ----------------------------------------------------------------------------------------------------------
# What answers
# ----------------------------------------------------------------------------------------------------------


def _connect_drawing(page: gr.Blocks, studio: Studio, drawing: Drawing, form: Form) -> None:
    """The canvas answers at once: its background, imported paths, the preview of the flow map."""

    def background(path, name):
        with shown():
            told, seen = studio.picture(path, name) if path else (None, None)
            picture = Path(path).parent.name if path else ""  # each upload has a folder of its own
            return {"background": told, "seen": seen, "of": picture, "size": list(reversed(studio.sizes[name]))}

    def imported(path, picture, name, count, *said):
        if path is None:
            return gr.skip(), gr.skip(), gr.skip()
        with shown():
            asked = dict(zip(drawing.reading, said, strict=True))
            points, word = studio.read_trajectories(path, name, count, picture, **asked)
            return {"add": points}, None, word

    def previewed(drawn, name, count):
        with shown():
            return _picture(studio.preview(drawn, name, count))

    canvas, first, paths, reading, preview = drawing
    sizes, frames = form.settings["size"], form.settings["num_frames"]
    # Through the queue, beside the device: Gradio shows no errors of what goes past it.
    quick = {"show_progress": "hidden", "api_name": False}
    first.change(background, [first, sizes], canvas, **quick)
    sizes.change(background, [first, sizes], canvas, **quick)
    # A file that was refused stays, until what settles it is said.
    again = [field.change if isinstance(field, gr.Dropdown) else field.submit for field in reading.values()]
    inputs = [paths, first, sizes, frames, *reading.values()]
    gr.on([paths.upload, *again], imported, inputs, [canvas, paths, form.status], **quick)
    drawn = [canvas, sizes, frames]
    canvas.input(previewed, drawn, preview, trigger_mode="always_last", **quick)
    frames.release(previewed, drawn, preview, trigger_mode="always_last", **quick)
    page.load(previewed, drawn, preview, **quick)


def _connect_generation(page: gr.Blocks, studio: Studio, drawing: Drawing, form: Form, results: Results) -> None:
    """The buttons, the gallery, and the end of a visit."""
    ends = [drawing.first, form.last, form.start, form.end]

    def generate(values: dict, session: gr.Request, progress=gr.Progress()):  # noqa: B008 (Gradio's way)
        asked = {name: values[field] for name, field in form.settings.items()}
        head, tail, before, after = (values[field] for field in ends)
        with shown():
            if (head and before) or (tail and after):
                raise UserError("give a frame or a clip for each end, not both")
            uploads = {0: head or before, -1: tail or after}

            def tell(done: int, total: int) -> None:
                progress((done, total), desc="sampling", unit="steps")

            try:
                made = studio.generate(session.session_hash or "", values[drawing.canvas], asked, uploads, tell)
            except CancelledError:
                raise gr.Error("cancelled", duration=3, print_exception=False) from None
        posters = [str(each.poster) for each in studio.visit(session.session_hash or "").made]
        *files, status = _told(made)
        return (*files, posters, status)

    def chosen(event: gr.SelectData, session: gr.Request):
        return _told(studio.visit(session.session_hash or "").made[event.index])

    def cancel(session: gr.Request) -> str:
        studio.visit(session.session_hash or "").cancel()
        return "cancelled"

    def left(session: gr.Request) -> None:
        studio.leave(session.session_hash or "")

    *files, gallery = results
    event = form.run.click(
        generate,
        {drawing.canvas, *form.settings.values(), *ends},
        [*files, gallery, form.status],
        concurrency_limit=1,
        concurrency_id="device",
        show_progress_on=[form.status],
        api_name="generate",
    )
    form.stop.click(cancel, None, form.status, queue=False, cancels=[event], api_name=False)
    gallery.select(chosen, None, [*files, form.status], queue=False, api_name=False)
    page.unload(left)


def _told(made: Made) -> tuple:
    """A video's files for `Results`, and its line of status."""
    videos = (str(path) if path else None for path in (made.video, made.overlay, made.flow))
    return (*videos, [str(path) for path in made.files], _status(made))


def _presets() -> dict[str, list[Any]]:
    return {
        name: [np.round(points, 5).tolist() for points in trajectory.load(path)]
        for name, path in trajectory.presets().items()
    }


def _picture(address: str) -> str:
    """Of the flow map. The address is made here, never by a visitor."""
    return f'<img src="{address}" alt="The flow map that the model will see">' if address else ""


def _status(made: Made) -> str:
    error = "no path" if made.error is None else f"TrajError {made.error:.1f} px (tracked by Lucas-Kanade)"
    prompt = made.settings["prompt"]
    lost = "".join(f"; {each}" for each in made.lost)
    return f"{error}; seed {made.settings['seed']}, {made.settings['num_frames']} frames: {prompt}{lost}"
