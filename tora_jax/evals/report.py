"""Writes the results of an evaluation: JSON, CSV, a table with the paper's numbers, plots, stills and a page."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tora_jax.errors import UserError
from tora_jax.evals import fvd
from tora_jax.io import overlay
from tora_jax.io.files import write_atomic
from tora_jax.io.video import read_video

# metric -> (heading, format); the order of the table
COLUMNS = {
    "traj_error": ("TrajError", ".2f"),
    "traj_error_median": ("median", ".2f"),
    "endpoint": ("endpoint", ".2f"),
    "within_8": ("within 8 px", ".0%"),
    "visible": ("visible", ".0%"),
    "path_error_percent": ("path error, % of width", ".2f"),
    "found": ("object found", ".0%"),
    "fvd": ("FVD", ".0f"),
    "clipsim": ("CLIPSIM", ".4f"),
    "psnr_first": ("first frame, dB", ".1f"),
    "psnr": ("PSNR, dB", ".1f"),
    "ssim": ("SSIM", ".3f"),
    "flicker": ("flicker", ".2f"),
    "motion": ("motion, %", ".2f"),
}
# Tora, tables 1 and 2: method -> frames -> (FVD, TrajError).
PAPER = {
    "Tora": {16: (438, 7.23), 64: (460, 8.45), 128: (494, 11.72)},
    "MotionCtrl": {128: (731, 38.39)},
    "DragNUWA": {128: (784, 41.25)},
    "VideoComposer": {128: (856, 58.76)},
    "Open-Sora, no trajectories": {128: (533, 373.17)},
}
STILLS, STILL_CLIPS = 6, 4  # pictures of a clip, and clips of a size, on a sheet of stills

Record = Mapping[str, Any]


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Means over clips of every metric that any of them has, the median of TrajError, and FVD.

    Warns:
      there are few clips for FVD.
    """
    names = dict.fromkeys(name for record in records for name in record["metrics"])
    means: dict[str, Any] = {"clips": len(records)}
    for name in names:
        values = [value for record in records if (value := record["metrics"].get(name)) is not None]
        means[name] = float(np.mean(values)) if values else None
    means["traj_error_median"] = float(np.median([record["metrics"]["traj_error"] for record in records]))
    features = [(record["features"], record["true_features"]) for record in records if "features" in record]
    if len(features) > 1:
        made, true = (np.array(side) for side in zip(*features, strict=True))
        means["fvd"] = fvd.frechet_distance(made, true)
    return means


def write(out: Path, results: Mapping[str, Any], records: Mapping[str, Sequence[Record]]) -> None:
    """Writes everything under a folder.

    Args:
      results: `cells`, a list of {"name", "frames", "height", "width", "fps", "trajectory", "left_out" (number of
        clips), **`summarise`}; `left_out`, metric -> why; `size`, `tracker` and whatever else should be on record.
      records: cell -> its clips: `name`, `prompt`, `given`, `tracked`, `video` (the file, relative to the folder), and
        `metrics`.

    Raises:
      UserError: matplotlib is not installed, or a file cannot be written.
    """
    _write(out / "results.json", json.dumps(results, indent=2) + "\n")
    _write(out / "clips.csv", _csv({"cell": cell, **_row(r)} for cell, found in records.items() for r in found))
    _write(out / "cells.csv", _csv(results["cells"]))
    _write(out / "table.md", table(results))
    _write(out / "index.html", page(results, records))
    plots(out, results["cells"])


def _row(record: Record) -> dict[str, Any]:
    return {"name": record["name"], "prompt": record["prompt"], **record["metrics"]}


def _write(path: Path, text: str) -> None:
    with write_atomic(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _csv(rows) -> str:
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ----------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a row for each size, then the paper's own numbers, then missing metrics with the reason."""
    cells = results["cells"]
    shown = {name: column for name, column in COLUMNS.items() if any(cell.get(name) is not None for cell in cells)}
    head = ["frames, size", "clips", *(heading for heading, _ in shown.values())]
    lines = [_line(head), _line(["---"] * len(head))]
    for cell in cells:
        values = ("–" if cell.get(name) is None else f"{cell[name]:{form}}" for name, (_, form) in shown.items())
        lines.append(_line([title(cell), str(cell["clips"]), *values]))
    width, height = results["size"]
    lines += [
        "",
        f"TrajError: mean of |dx| + |dy| in pixels of a {width}x{height} frame, over trajectories and frames, by the "
        f"tracker `{results['tracker']}`. Flicker: mean change along the flow, 0..255.",
        "",
        *(line for name, why in results["left_out"].items() for line in (f"{name} is left out: {why}", "")),
        *(
            line
            for cell in cells
            if cell["left_out"]
            for line in (f"{title(cell)}: clips left out, without a trajectory inside: {cell['left_out']}", "")
        ),
        "The paper's numbers, on 185 real clips at 512x512, which are not these clips:",
        "",
        _line(["method", "frames", "FVD", "TrajError"]),
        _line(["---"] * 4),
        *(_line([name, *map(str, (f, *two))]) for name, found in PAPER.items() for f, two in found.items()),
    ]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def title(cell: Mapping[str, Any]) -> str:
    """Such as "17 frames, 128x128, 8 fps"."""
    free = "" if cell["trajectory"] else ", no trajectory"
    return f"{cell['frames']} frames, {cell['width']}x{cell['height']}, {cell['fps']:g} fps{free}"


# ----------------------------------------------------------------------------------------------------------
# Plots
# ----------------------------------------------------------------------------------------------------------


def plots(out: Path, cells: Sequence[Mapping[str, Any]]) -> None:
    """error_by_frames.svg and error_by_resolution.svg: TrajError, and the paper's beside it.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # of the extra "eval"; without pyplot nothing global is kept
    except ImportError:
        raise UserError("the plots need matplotlib: pip install 'tora_jax[eval]'") from None

    def size(cell: Mapping[str, Any]) -> str:
        return f"{cell['width']}x{cell['height']}"

    views = {
        "frames": (lambda cell: cell["frames"], size, "frames"),
        "resolution": (
            lambda cell: min(cell["height"], cell["width"]),
            lambda cell: f"{cell['frames']} frames",
            "shorter side, pixels",
        ),
    }
    for name, (x, series, label) in views.items():
        axes = (figure := Figure((6, 4), layout="constrained")).add_subplot()
        lines: dict[str, list[tuple[float, float]]] = {}
        for cell in cells:
            key = series(cell) + ("" if cell["trajectory"] else ", no trajectory")
            lines.setdefault(key, []).append((x(cell), cell["traj_error"]))
        for key, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=key)
        if name == "frames":
            points = [(frames, error) for frames, (_, error) in PAPER["Tora"].items()]
            axes.plot(*zip(*points, strict=True), "s--", color="grey", label="Tora, the paper's clips")
        axes.set(xlabel=label, ylabel="TrajError, pixels", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
        with write_atomic(out / f"error_by_{name}.svg") as aside:
            # Neither dates nor random names: the same figures give the same file.
            figure.savefig(aside, format="svg", metadata={"Date": None, "Creator": None})


# ----------------------------------------------------------------------------------------------------------
# Stills
# ----------------------------------------------------------------------------------------------------------


def stills(out: Path, folder: Path, cell: str, records: Sequence[Record]) -> Path:
    """A sheet of pictures, a row for each of the first clips: the given path so far, and where its point is (cross).

    Args:
      out: the folder of the evaluation, with the videos.
      folder: to write into.

    Returns:
      the file.
    """
    rows = []
    for record in records[:STILL_CLIPS]:
        video, _ = read_video(out / record["video"])
        drawn = overlay.draw_tracks(video, np.array(record["given"], np.float32))
        wanted = np.linspace(0, len(video) - 1, STILLS).round().astype(int)
        rows.append(np.concatenate([_crosses(drawn[j], np.array(record["tracked"])[:, j]) for j in wanted], axis=1))
    path = folder / f"{cell}.webp"
    with write_atomic(path) as aside:
        Image.fromarray(np.concatenate(rows)).save(aside, format="webp", quality=80)
    return path


def _crosses(frame: np.ndarray, points: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    half, thick = max(round(min(height, width) / 36), 2), max(min(height, width) // 180, 1)
    frame = frame.copy()
    for x, y in np.round(points * (width, height) - 0.5).astype(int):
        for colour, grown in ((0, 1), (255, 0)):  # white with a dark rim
            for dx, dy in ((half, thick // 2), (thick // 2, half)):
                rows = slice(max(y - dy - grown, 0), max(y + dy + grown + 1, 0))
                frame[rows, max(x - dx - grown, 0) : max(x + dx + grown + 1, 0)] = colour
    return frame


# ----------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 14px/1.4 sans-serif; margin: 2em; color: #222; background: #fff }
table { border-collapse: collapse } td, th { border: 1px solid #ccc; padding: 3px 8px; text-align: right }
.clips { display: flex; flex-wrap: wrap; gap: 12px } figure { margin: 0; width: 256px }
.shown { position: relative } video { width: 100%; display: block }
svg { position: absolute; inset: 0; width: 100%; height: 100%; pointer-events: none }
polyline { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke }
.given { stroke: #fff; stroke-dasharray: 5 4 } .tracked { stroke: #e6194b }
"""
# The dots go along with the video: white where the path is, red where the tracker is.
SCRIPT = """
for (const shown of document.querySelectorAll('.shown')) {
  const video = shown.querySelector('video'), dots = shown.querySelectorAll('circle');
  const paths = JSON.parse(shown.dataset.paths);
  const place = () => {
    const last = paths[0].length - 1, share = video.duration ? video.currentTime / video.duration : 0;
    const j = Math.min(Math.floor(share * (last + 1)), last);
    dots.forEach((dot, i) => { dot.setAttribute('cx', paths[i][j][0]); dot.setAttribute('cy', paths[i][j][1]); });
    requestAnimationFrame(place);
  };
  if (paths.length) place();
}
"""


def page(results: Mapping[str, Any], records: Mapping[str, Sequence[Record]]) -> str:
    """HTML with every video; the given paths (white, dashed) and the tracks (red) are drawn over it."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Evaluation</title>",
        f"<style>{STYLE}</style><h1>Evaluation</h1>",
        "<p>White, dashed: the path that was given. Red: where the tracker found its start point to go.</p>",
        _html_table(table(results)),
        "".join(f'<img src="error_by_{name}.svg" alt="TrajError by {name}">' for name in ("frames", "resolution")),
    ]
    for cell in results["cells"]:
        parts.append(f"<h2>{html.escape(title(cell))}</h2><div class=clips>")
        parts += [_figure(record, cell["width"] / cell["height"]) for record in records[cell["name"]]]
        parts.append("</div>")
    return "\n".join([*parts, f"<script>{SCRIPT}</script></html>"])


def _figure(record: Record, aspect: float) -> str:
    paths = [(kind, path) for kind in ("given", "tracked") for path in record[kind]]
    drawn = "".join(
        f'<polyline class={kind} points="{" ".join(f"{x:.4f},{y:.4f}" for x, y in path)}"/>' for kind, path in paths
    )
    drawn += "".join(f'<circle r=".012" fill="{"#fff" if kind == "given" else "#e6194b"}"/>' for kind, _ in paths)
    told = ", ".join(
        f"{heading} {record['metrics'][name]:{form}}"
        for name, (heading, form) in COLUMNS.items()
        if record["metrics"].get(name) is not None
    )
    where = html.escape(json.dumps([path for _, path in paths]), quote=True)
    return (
        f'<figure><div class=shown data-paths="{where}" style="aspect-ratio:{aspect:.4f}">'
        f'<video src="{html.escape(record["video"], quote=True)}" autoplay loop muted playsinline controls></video>'
        f'<svg viewBox="0 0 1 1" preserveAspectRatio="none">{drawn}</svg></div>'
        f"<figcaption>{html.escape(record['prompt'])}<br>{html.escape(told)}</figcaption></figure>"
    )


def _html_table(markdown: str) -> str:
    lines = []
    for line in markdown.splitlines():
        if line.startswith("|") and "---" not in line:
            lines.append(
                "<tr>" + "".join(f"<td>{html.escape(v)}</td>" for v in line.strip("| ").split(" | ")) + "</tr>"
            )
        elif line and not line.startswith("|"):
            lines.append(f"</table><p>{html.escape(line)}</p><table>")
    return f"<table>{''.join(lines)}</table>"
