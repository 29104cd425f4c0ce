"""The page itself: one component with its own script, and the functions that answer it."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from tora_jax.app import examples, uploads
from tora_jax.app.form import MOST_PATHS, MOST_TEXT
from tora_jax.app.studio import KEPT, Made, Studio, Work
from tora_jax.conditioning import trajectory
from tora_jax.errors import UserError

WEB = Path(__file__).parent / "web"
SCRIPTS = ("geometry", "player", "canvas", "tools", "files", "work", "start")  # one after the other, in one function
READERS = 4  # files that are read at once: a picture may take 300 MB
CSS = """
body { margin: 0; }
.gradio-container .main.app { padding: 0; max-width: none; }
#tora .html-container { padding: 0; }
footer { display: none; }
"""
THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none to be fetched

Answer = dict[str, Any]


def build(studio: Studio, uploaded: Path) -> gr.Blocks:
    """The page of a studio.

    Args:
      uploaded: the folder of uploads; no other file is read for a visitor.
    """
    origin = studio.models.origin
    gr.set_static_paths([studio.folder, examples.folder(origin)])  # results go with their visit
    with gr.Blocks(title="Tora", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        canvas = gr.HTML(
            {},
            html_template=(WEB / "page.html").read_text(),
            css_template=(WEB / "page.css").read_text(),
            js_on_load="\n".join((WEB / f"{name}.js").read_text() for name in SCRIPTS),
            apply_default_css=False,
            elem_id="tora",
            server_functions=_answers(studio, uploaded),
            start=_start(studio),
        )

        def arrived(session: gr.Request) -> Answer:
            """The name of the visit, and the request of the link."""
            told: Answer = {"visit": session.session_hash}
            if text := session.query_params.get("request"):
                try:
                    told |= studio.form.shared(text)
                except UserError as error:
                    told["error"] = str(error)
            return told

        def left(session: gr.Request) -> None:
            studio.leave(session.session_hash or "")

        page.load(arrived, None, canvas, show_progress="hidden", queue=False, api_name=False)
        page.unload(left)
    return page.queue(default_concurrency_limit=4)


def _start(studio: Studio) -> Answer:
    """What the script begins with."""
    form = studio.form
    presets = {
        name: [np.round(points, 5).tolist() for points in trajectory.load(path)]
        for name, path in trajectory.presets().items()
    }
    return {
        "prompt": form.defaults.prompt,
        "sizes": {name: [width, height] for name, (height, width) in form.sizes.items()},
        "lengths": form.lengths,
        "num_frames": form.defaults.num_frames,
        "segment": form.defaults.segment,
        "fps": form.defaults.fps,
        "fields": form.fields(),
        "needs_picture": form.needs_picture,
        "presets": presets,
        "examples": examples.read(studio.models.origin),
        "limits": {"text": MOST_TEXT, "paths": MOST_PATHS, "kept": KEPT},
    }


def _answers(studio: Studio, uploaded: Path) -> list[Callable[[Any], Answer]]:
    """The functions that the script calls, each with one object. A person's mistake comes back as "error"."""
    form, readers = studio.form, threading.Semaphore(READERS)

    def file(path: Any) -> str:
        """An uploaded file of the visitor's."""
        if not isinstance(path, str) or len(path) > 4096 or "\0" in path:
            raise UserError("no file was given")
        found = Path(path).resolve()
        if not found.is_relative_to(uploaded.resolve()) or found.is_relative_to(studio.folder.resolve()):
            raise UserError("no such upload")
        if not found.is_file():
            raise UserError("the upload is gone, as after an hour; give it again")
        return str(found)

    def files(given: Any) -> dict[int, str]:
        if not isinstance(given, Mapping) or given.keys() - {"0", "-1"}:
            raise UserError("files are given for the first and the last frame")
        return {int(frame): file(path) for frame, path in given.items() if path}

    def request(data: Mapping) -> tuple[Any, Any, dict[int, str]]:
        return data.get("drawn"), data.get("asked"), files(data.get("given") or {})

    def read(data: Mapping) -> Answer:
        """What a dropped file is, and what is in it."""
        path, size = file(data.get("path")), form.size(data.get("size"))
        with readers:
            with uploads.named(path):
                kind = uploads.kind(path)
            if kind == "request":
                return {"kind": kind, **form.shared(Path(path).read_text())}
            if kind != "paths":
                background, seen = uploads.picture(path, size)
                return {"kind": kind, "background": background, "seen": seen}
            picture, count = data.get("picture") or None, form.frames(data.get("num_frames"))
            found = uploads.readings(path, size, count, picture and file(picture), data.get("said"))
        return {"kind": kind, "readings": found}

    def preview(data: Mapping) -> Answer:
        """The flow map of what is drawn, and how long its video will take, or why it cannot be made."""
        drawn, asked, given = request(data)
        points = form.trajectories(drawn)
        asked = asked if isinstance(asked, Mapping) else {}
        size, count = form.size(asked.get("size")), form.frames(asked.get("num_frames"))
        flow, frames = uploads.flow_strip(points or [], size, count)
        try:
            told = {"seconds": studio.expect(drawn, asked, given)}
        except UserError as error:
            told = {"refused": str(error)}
        return {"flow": flow, "frames": frames, **told}

    def begin(data: Mapping) -> Answer:
        return _told(studio.begin(_visit(data), *request(data)), 0)

    def look(data: Mapping) -> Answer:
        """How far the visit's video is."""
        seen = data.get("seen")
        return _told(studio.visit(_visit(data)).work, seen if isinstance(seen, int) else 0)

    def cancel(data: Mapping) -> Answer:
        studio.visit(_visit(data)).cancel()
        return {}

    return [_answer(each) for each in (read, preview, begin, look, cancel)]


def _answer(function: Callable[[Mapping], Answer]) -> Callable[[Any], Answer]:
    @functools.wraps(function)
    def answer(data):
        try:
            return function(data if isinstance(data, Mapping) else {})
        except UserError as error:
            return {"error": str(error)}

    del answer.__wrapped__, answer.__annotations__  # Gradio looks for arguments of its own kinds
    return answer


def _visit(data: Mapping) -> str:
    name = data.get("visit")
    if not isinstance(name, str) or not 0 < len(name) <= 64:
        raise UserError("the visit has no name; open the page again")
    return name


def _told(work: Work | None, seen: int) -> Answer:
    """Work as the page shows it; a picture only if it is newer than the `seen`th."""
    if work is None:
        return {"failed": "there is nothing under way"}
    told = {name: getattr(work, name) for name in ("place", "done", "total", "left", "pictures")}
    if work.pictures > seen:
        told["picture"] = work.picture
    if work.made is not None:
        told["made"] = _result(work.made)
    if work.error is not None:
        told["failed"] = work.error
    return told


def _result(made: Made) -> Answer:
    """Paths are served as they are: the folder's name is a random number."""
    error = "" if made.error is None else f"TrajError {made.error:.1f} px (tracked by Lucas-Kanade)"
    return {
        "video": str(made.video),
        "files": [str(path) for path in made.files],
        "error": error,
        "lost": list(made.lost),
        "settings": json.loads(json.dumps(made.settings, default=str)),
    }
