"""The files of a generated video: the video, the same with its paths, the motion map, the report; all or none."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from tora_jax.errors import UserError
from tora_jax.io import files, overlay
from tora_jax.io.files import write_atomic
from tora_jax.io.video import video_writer
from tora_jax.sampling.generate import Result, add_seconds

POINT = re.compile(r"\[\n +(-?[\d.e-]+),\n +(-?[\d.e-]+)\n +\]")  # no text in JSON has a line break


def paths(out: Path) -> dict[str, Path]:
    """The paths of all files: the video, the same with the trajectories, the motion map, the report."""
    named = {part: out.with_stem(f"{out.stem}_{part}") for part in ("trajectory", "flow")}
    return {"video": out, **named, "report": out.with_suffix(".json")}


def picture(out: Path) -> Path:
    """The path of the picture that a dry run writes in place of a video."""
    return out.with_name(f"{out.stem}_trajectory.png")


def check(name: str, inputs: Sequence[str | Path] = (), weights: str | None = None, dry_run: bool = False) -> Path:
    """Checks the path of a video, before the long work starts.

    Args:
      inputs: files that are read, and must not be overwritten.
      weights: a folder that must not be written to.
      dry_run: a picture is written in place of videos.

    Raises:
      UserError: the video cannot be written there.
    """
    out = files.path(name)
    if out.suffix.lower() not in (".mp4", ".gif"):
        raise UserError(f"--out {name}: a video is written; end the name in .mp4 or .gif")
    if out.is_dir():
        raise UserError(f"--out {name}: this is a folder; name a file")
    files.check_writable(out.parent, f"--out {name}")
    taken = {files.path(path).resolve() for path in inputs}
    for path in [picture(out), paths(out)["report"]] if dry_run else paths(out).values():
        if path.resolve() in taken:
            raise UserError(f"--out {name}: would overwrite {path}, which is read; choose another name")
    if weights is not None and files.path(weights).resolve() in out.resolve().parents:
        raise UserError(f"--out {name}: lies in the folder of the weights; choose another place")
    return out


@contextlib.contextmanager
def open_files(
    out: Path, tracks: Float[np.ndarray, "n t 2"] | None, report: dict[str, Any]
) -> Iterator[Callable[[Result], None]]:
    """Yields a function that takes the pieces of one video, in order; at the end all files are there, or none.

    Each file is written aside as the pieces come. All are renamed at the end, the report last: a report means that the
    others are there. Makes missing folders.

    Args:
      out: of the video.
      tracks: of the whole video.
      report: has "settings". Gets the tracks, the files and the seconds of the pieces; entries that the caller adds
        meanwhile are written, too.
    """
    fps, places = report["settings"]["fps"], paths(out)
    if tracks is not None:
        report["tracks"] = listed(tracks)
    report.setdefault("seconds", {})
    out.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        aside = stack.enter_context(write_atomic(places["report"]))
        wanted = ["video"] if tracks is None else ["video", "trajectory", "flow"]
        writers = {part: stack.enter_context(video_writer(places[part], fps)) for part in wanted}
        start = 0

        def write(piece: Result) -> None:
            nonlocal start
            writers["video"](piece.video)
            if tracks is not None:
                writers["trajectory"](overlay.draw_tracks(piece.video, tracks, start))
                writers["flow"](piece.motion)
            start += len(piece.video)
            add_seconds(report["seconds"], piece.seconds)

        yield write
        report["files"] = [places[part].name for part in wanted]
        aside.write_text(dumps(finish(report)))


def listed(tracks: Float[np.ndarray, "n t 2"]) -> list:
    """Tracks as a report has them."""
    return np.round(np.asarray(tracks, np.float64), 6).tolist()


def dumps(report: dict[str, Any]) -> str:
    """A report as JSON; a point is on one line."""
    return POINT.sub(r"[\1, \2]", json.dumps(report, indent=2)) + "\n"


def finish(report: dict[str, Any]) -> dict[str, Any]:
    """Completes a report: rounded seconds, versions, the device."""
    return {
        **report,
        "seconds": {part: {k: round(v, 3) for k, v in s.items()} for part, s in report["seconds"].items()},
        **versions(),
        "device": jax.devices()[0].device_kind,
    }


def versions() -> dict[str, Any]:
    """Those of the packages and of Python, for a report."""
    found = {name: importlib.metadata.version(name) for name in ("tora_jax", "jax", "flax", "numpy")}
    return {"versions": found, "python": platform.python_version()}
