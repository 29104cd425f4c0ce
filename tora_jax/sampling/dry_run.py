"""What a run would take in, without the model: every input is read, its reading is said, written and drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tora_jax.backbones.assembly import Models
from tora_jax.conditioning import images, trajectory
from tora_jax.errors import UserError
from tora_jax.io import overlay
from tora_jax.io.files import write_atomic, write_text
from tora_jax.io.video import cover
from tora_jax.sampling import batch_file, request, writer
from tora_jax.sampling.generate import video_size

GREY = 96  # where no frame is given


def run(models: Models, wanted: request.Request, given: Mapping[int, images.Given], out: Path) -> list[str]:
    """Writes the report of a video, and the paths over its first given frame.

    Args:
      models: of `request.outline`.
      wanted: placed (`request.place`).
      given: of `wanted.read`.
      out: of the video.

    Returns:
      how each input was read.
    """
    return _write(models, wanted, given, out, {})


def run_batch(models: Models, jobs: list[batch_file.Job], folder: Path) -> list[str]:
    """`run` for the lines of a batch, but for those whose video is there.

    Returns:
      how each input was read, and the mistakes, all after the number of their line.
    """
    lines = []
    for job in jobs:
        report: dict[str, Any] = {"line": job.line}
        out, name = batch_file.video(folder, job), f"line {job.line}"
        if (folder / f"{job.name}.json").is_file() and out.exists():
            lines.append(f"{name}: {out} is there; it stays as it is, with its report")
            continue
        try:
            if isinstance(job.wanted, UserError):
                raise job.wanted
            wanted = request.place(models, job.wanted)
            wanted.warn(f"{name}: ")
            lines += [f"{name}: {line}" for line in _write(models, wanted, wanted.read(), out, report)]
        except UserError as error:
            message = " ".join(str(error).split())
            lines.append(f"{name}: error: {message}")
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / f"{job.name}.json", writer.dumps({**report, "dry_run": True, "error": message}))
    return lines


def _write(
    models: Models, wanted: request.Request, given: Mapping[int, images.Given], out: Path, report: dict[str, Any]
) -> list[str]:
    size = video_size(models, wanted.settings.height, wanted.settings.width)
    names = wanted.settings.trajectory
    presets = [f"{each}: a preset" for each in names if trajectory.is_preset(trajectory.find(each))]
    lines = [*wanted.lines, *presets, *_pictures(wanted, given, size)]
    frames = images.fit({min(given): given[min(given)]} if given else {}, size)
    frame = next((each.pixels for each in frames.values()), np.full((*size, 3), GREY, np.uint8))
    frame = frame if frame.ndim == 3 else frame[0]
    tracks = wanted.tracks
    report = {**report, "dry_run": True, "settings": wanted.settings.report(), "lost": wanted.lost, "read": lines}
    if tracks is not None:
        frame = overlay.draw_tracks(frame[None], tracks, wanted.settings.num_frames - 1)[0]
        report["tracks"] = writer.listed(tracks)
    picture = writer.picture(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with write_atomic(picture) as aside:
        Image.fromarray(frame).save(aside)
    write_text(writer.paths(out)["report"], writer.dumps({**report, "files": [picture.name], **writer.versions()}))
    return lines


def _pictures(wanted: request.Request, given: Mapping[int, images.Given], size: tuple[int, int]) -> list[str]:
    lines = []
    for condition, (start, (pixels, _)) in zip(wanted.conditions, given.items(), strict=True):
        height, width = pixels.shape[-3:-1]
        whole = cover(height, width, *size)[:2]
        name = "the picture" if isinstance(condition.source, np.ndarray) else condition.source
        count = f" {len(pixels)} frames of" if pixels.ndim == 4 else ""
        lost = 1 - size[0] * size[1] / (whole[0] * whole[1])
        crop = f", {lost:.0%} of it cropped away" if round(lost, 2) else ""
        lines.append(f"{name}:{count} {width}x{height}, for frame {start}; scaled to {size[1]}x{size[0]}{crop}")
    return lines
