"""The fate of all files and clips: counts, histograms, and pictures of kept and dropped clips, on one page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tora_jax.data.curate.filters import REASONS, ClipFacts

SHORT = 90  # pixels of a picture's shorter side
# Score -> the range of its histogram; values outside are counted at the ends.
RANGES = {
    "seconds": (0.0, 20.0),
    "flow": (0.0, 50.0),
    "foreground": (0.0, 0.5),
    "pan": (-0.5, 0.5),
    "tilt": (-0.5, 0.5),
    "zoom": (-0.5, 0.5),
    "roll": (-0.5, 0.5),
    "shake": (0.0, 0.5),
    "aesthetic": (1.0, 10.0),
}
BINS = 20

Counted = Iterator[tuple[tuple[str, ...], float]]


def count_paths(paths: Iterable[str]) -> Counted:
    """Counts files of the same content, of which only the first is used."""
    number = len(list(paths))
    yield ("files", "total"), number
    if number > 1:
        yield ("files", "dropped", "same file"), number - 1


def count_file(facts: Mapping[str, Any]) -> Counted:
    """Counts what the first stage found in a file."""
    if facts["reason"]:
        yield ("files", "dropped", facts["reason"]), 1
    else:
        yield ("files", "used"), 1
    if "video" in facts:
        yield ("files", "seconds"), facts["video"]["seconds"]
        yield ("files", "scenes"), facts["scenes"]
        yield ("files", "short scenes"), facts["short scenes"]
        for trait in facts["video"]["traits"]:
            yield ("files", "traits", trait), 1


def count_clip(clip: ClipFacts) -> Counted:
    """Counts a clip and its fate."""
    yield ("clips", "total"), 1
    yield ("clips", "seconds"), clip["seconds"]
    yield ("clips", "copied" if clip["copied"] else "encoded"), 1
    fate = "dropped" if clip["reason"] else "kept"
    if clip["reason"]:
        yield ("clips", "dropped", clip["reason"]), 1
    else:
        yield ("clips", "kept"), 1
        yield ("clips", "kept seconds"), clip["seconds"]
    if "camera" in clip:
        yield ("cameras", fate, clip["camera"]), 1
    for name, (low, high) in RANGES.items():
        if clip.get(name) is not None:
            place = int(np.clip((clip[name] - low) / (high - low) * BINS, 0, BINS - 1))
            yield ("histograms", name, fate, str(place)), 1


def stats(numbers: Iterable[tuple[tuple[str, ...], float]], folder: str) -> dict[str, Any]:
    """The content of stats.json, from the counts."""
    nested: dict[str, Any] = {"data": folder}
    nested |= {"files": dict.fromkeys(("total", "used", "scenes", "short scenes"), 0)}
    nested["files"] |= {"seconds": 0.0, "dropped": {}, "traits": {}}
    nested |= {"clips": dict.fromkeys(("total", "kept", "copied", "encoded"), 0)}
    nested["clips"] |= {"seconds": 0.0, "kept seconds": 0.0, "dropped": {}}
    nested |= {"cameras": {"kept": {}, "dropped": {}}, "histograms": {}}
    for path, number in sorted(numbers):
        if path[0] == "histograms":
            _, name, fate, place = path
            empty = {"range": RANGES[name], "kept": [0] * BINS, "dropped": [0] * BINS}
            nested["histograms"].setdefault(name, empty)[fate][int(place)] += number
            continue
        at = nested
        for part in path[:-1]:
            at = at[part]
        at[path[-1]] = round(number, 3)
    return nested


def sheet(frames: UInt8[np.ndarray, "t h w 3"]) -> bytes:
    """Frames side by side, as JPEG."""
    file = io.BytesIO()
    Image.fromarray(np.concatenate(list(frames), axis=1)).save(file, "JPEG", quality=75)
    return file.getvalue()


# ----------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; } td { padding: .15rem 1.2rem .15rem 0; } td:last-child { text-align: right; }
.row { display: flex; flex-wrap: wrap; gap: 1rem 2rem; }
figure { margin: 0; } figcaption { font-size: 12px; color: #555; max-width: 520px; }
img { display: block; max-width: 100%; border-radius: 3px; }
.kept { fill: #2a7de1; background: #2a7de1; } .dropped { fill: #c9ccd1; background: #c9ccd1; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }
"""


def page(stats: Mapping[str, Any], samples: Sequence[tuple[str, ClipFacts, bytes]]) -> str:
    """The content of report.html, with the pictures in it.

    Args:
      samples: ("kept" or the reason, clip, JPEG) of some clips.
    """
    found, clips = stats["files"], stats["clips"]
    groups = {name: [] for name in ("kept", *REASONS)}
    for group, clip, picture in sorted(samples, key=lambda sample: sample[1]["name"]):
        groups[group].append(_figure(clip, picture))
    counts = {"kept": clips["kept"], **clips["dropped"]}
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Curation</title>",
        f"<style>{STYLE}</style><h1>Curation</h1><div class=row>",
        _table(
            "Files",
            {
                "files": found["total"],
                "used": found["used"],
                "length": _time(found["seconds"]),
                "scenes": found["scenes"],
                "too short for a clip": found["short scenes"],
                **{f"dropped: {reason}": number for reason, number in found["dropped"].items()},
                **{f"odd: {trait}": number for trait, number in found["traits"].items()},
            },
        ),
        _table(
            "Clips",
            {
                "clips": clips["total"],
                "kept": clips["kept"],
                "length": _time(clips["seconds"]),
                "length kept": _time(clips["kept seconds"]),
                **{f"dropped: {reason}": number for reason, number in clips["dropped"].items()},
                "packets copied": clips["copied"],
                "encoded anew": clips["encoded"],
            },
        ),
        _table("Camera, of kept clips", stats["cameras"]["kept"]),
        "</div><h2>Scores<span class='key kept'></span>kept<span class='key dropped'></span>dropped</h2>",
        "<div class=row>",
        *(_histogram(name, stats["histograms"][name]) for name in RANGES if name in stats["histograms"]),
        "</div>",
    ]
    for name, figures in groups.items():
        if figures:
            parts.append(f"<h2>{html.escape(name)}: {len(figures)} of {counts.get(name, 0)}</h2>")
            parts.append(f"<div class=row>{''.join(figures)}</div>")
    return "\n".join(parts) + "</html>\n"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _table(title: str, entries: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><td>{html.escape(name)}<td>{value}" for name, value in entries.items())
    return f"<div><h2>{title}</h2><table>{rows}</table></div>"


def _histogram(name: str, found: Mapping[str, Any]) -> str:
    """Kept clips in front of all, as bars."""
    width, height = 240, 90
    whole = np.array(found["kept"]) + np.array(found["dropped"])
    top, step = max(whole.max(), 1), width / BINS
    bars = []
    for kind, values in (("dropped", whole), ("kept", found["kept"])):
        for i, value in enumerate(values):
            tall = value / top * height
            bars.append(
                f"<rect class={kind} x={i * step:.1f} y={height - tall:.1f} width={step - 1:.1f} height={tall:.1f} />"
            )
    low, high = found["range"]
    return (
        f"<figure><svg width={width} height={height} role=img aria-label='{name}'>{''.join(bars)}</svg>"
        f"<figcaption>{name}, {low:g} to {high:g}; tallest bar {top}</figcaption></figure>"
    )


def _figure(clip: ClipFacts, picture: bytes) -> str:
    numbers = {"flow": ".1f", "foreground": ".3f", "aesthetic": ".1f"}
    told = [f"{name} {clip[name]:{form}}" for name, form in numbers.items() if clip.get(name) is not None]
    words = [clip["name"], PurePath(clip["path"]).name, f"{clip['seconds']:.1f} s", clip["camera"], *told]
    words += [f"copy of {clip['copy_of']}"] if "copy_of" in clip else []
    caption = f"<br>{html.escape(clip['caption'])}" if "caption" in clip else ""
    source = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
    told = html.escape(" | ".join(words)) + caption
    return f"<figure><img src='{source}' alt=''><figcaption>{told}</figcaption></figure>"
