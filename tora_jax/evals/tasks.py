"""Tasks of an evaluation: prompts, trajectories and, where known, true clips to compare with.

A benchmark has
  names: of its tasks, fit for files.
  task(index, frames, height, width, fps): a `Task` at that size.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from tora_jax.conditioning import trajectory
from tora_jax.conditioning.images import Condition
from tora_jax.configs import sampling
from tora_jax.data.sprites.clips import WORLDS, make_clip
from tora_jax.errors import UserError
from tora_jax.io import files
from tora_jax.io.files import decode_text, is_hidden
from tora_jax.io.video import cover, read_image, resize_crop
from tora_jax.sampling import request

PICTURES = (".jpg", ".jpeg", ".png")
MIN_MASK = 0.001  # of the frame: an object with a smaller mask at the start gives no trajectory
VOID = 255  # in masks with other labels: not said


class Task(NamedTuple):
    """One video to make.

    Attributes:
      name: fit for a file.
      prompt: not cleaned yet.
      tracks: the given paths, (x, y) in 0..1 of the frame.
      video: the true clip, or its first frame alone; None where nothing is known.
      colours: of sprites, one for each track.
    """

    name: str
    prompt: str
    tracks: Float[np.ndarray, "n t 2"]
    video: UInt8[np.ndarray, "t2 h w 3"] | None
    colours: tuple[str, ...] = ()


class Sprites:
    """The first clips of a split of the synthetic set, drawn from their seeds at any size and length."""

    def __init__(self, split: str, count: int = 0, version: int = 1):
        if version not in WORLDS:
            raise UserError(f"benchmark.version is {version!r}; sprites have {', '.join(map(str, WORLDS))}")
        splits = WORLDS[version].splits
        if split not in splits:
            raise UserError(f"benchmark.split is {split!r}; sprites have {', '.join(splits)}")
        self.split, self.version = split, version
        self.names = tuple(f"{split}_{i:04}" for i in range(count or splits[split]))

    def task(self, index: int, frames: int, height: int, width: int, fps: float) -> Task:
        if height != width:
            raise UserError(f"the sprites are square, and the size is {width}x{height}")
        clip = make_clip(index, self.split, size=height, frames=frames, fps=fps, version=self.version)
        colours = tuple(sprite.colour for sprite in clip.sprites)
        return Task(self.names[index], clip.caption, clip.tracks, clip.video, colours)


class Listed:
    """A JSON file: a list of {"prompt", "trajectories", and if wished "name", "canvas", "image"}.

    Trajectories are points as `trajectory.parse` takes them, or names of files; files and images are looked for beside
    the list. An item may have the settings of reading (trajectory_axes ...), and paths drawn on its image follow it.

    Raises:
      UserError: the file is missing or has another form.
    """

    def __init__(self, path: Path):
        self.folder = path.parent
        try:
            self.items = json.loads(decode_text(path.read_bytes(), str(path)))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as JSON ({error})") from None
        if not isinstance(self.items, list) or not all(isinstance(item, dict) for item in self.items):
            raise UserError(f"{path}: should hold a list of objects with prompt and trajectories")
        for i, item in enumerate(self.items):
            if missing := {"prompt", "trajectories"} - item.keys():
                raise UserError(f"{path}: item {i} has no {', '.join(sorted(missing))}")
            if odd := [key for key in ("prompt", "name", "image") if not isinstance(item.get(key, ""), str)]:
                raise UserError(f"{path}: item {i} has a {odd[0]} that is no text")
        self.names = tuple(_file_name(item.get("name", f"{i:04}")) for i, item in enumerate(self.items))
        if len(set(self.names)) < len(self.names):
            raise UserError(f"{path}: two items have one name")

    def task(self, index: int, frames: int, height: int, width: int, fps: float) -> Task:
        item, name, image = self.items[index], self.names[index], None
        given = {key: item[key] for key in sampling.READING if key in item}
        points = item["trajectories"]
        if files := trajectory.names(points):
            given["trajectories"] = [self.folder / file for file in files]
            given |= {"trajectory_canvas": item["canvas"]} if "canvas" in item else {}
        else:
            canvas = "canvas" in item and not isinstance(points, dict)  # a dict has its own
            given["trajectories"] = {"canvas": item["canvas"], "trajectories": points} if canvas else points
        if "image" in item:
            image = resize_crop(read_image(self.folder / item["image"]), height, width)[None]
            given["conditions"] = [Condition(0, self.folder / item["image"])]
        size = {"height": height, "width": width, "num_frames": frames}
        try:
            wanted = request.make(size, given).placed((height, width))
            wanted.warn()
            tracks = wanted.tracks
        except UserError as error:
            raise UserError(str(error) if files else f"{name}: {str(error).removeprefix('trajectory: ')}") from None
        if tracks is None:
            raise UserError(f"{name}: holds no points; write at least 2")
        return Task(name, item["prompt"], tracks, image)


class VideoSegmentationBenchmark:
    """A set for video object segmentation, in DAVIS's layout, as trajectories and prompts.

      JPEGImages/[480p/]bear/00000.jpg ...     the frames
      Annotations/[480p/]bear/00000.png ...    their masks: 0 = background, other numbers (palette) = objects
      prompts.json                             {"bear": "a brown bear walks ..."}; else the name of the sequence

    The trajectory of an object is the centroid of its mask. A clip is brought to the length that is asked for by
    choosing (or repeating) frames evenly, and its centroids are read at the same times, linearly between the masks that
    there are; where an object is hidden, it goes straight. Objects that are not in the first frame, tiny there or in no
    other mask are left out, and so are sequences without any other.

    Warns:
      of sequences with masks of one frame alone, which say nothing of a path.

    Raises:
      UserError: the folder has another layout, or no sequence with masks of several frames.
    """

    def __init__(self, folder: Path, count: int = 0):
        frames, masks = folder / "JPEGImages", folder / "Annotations"
        for inside in (frames, masks):
            if not inside.is_dir():
                raise UserError(f"{folder}: has no folder {inside.name}; DAVIS's layout is JPEGImages and Annotations")
        found = {}
        for sequence in sorted({path.parent for path in frames.rglob("*") if _is_picture(path)}):
            pictures = {path.stem: path for path in _pictures(sequence)}
            labels = {path.stem: path for path in _pictures(masks / sequence.relative_to(frames))}
            # The first frame that has a mask starts the clip.
            first = next((i for i, stem in enumerate(pictures) if stem in labels), None)
            if first is not None and len(pictures) - first > 1:
                stems = list(pictures)[first:]
                known = [(j, labels[stem]) for j, stem in enumerate(stems) if stem in labels]
                found[sequence.relative_to(frames).as_posix()] = ([pictures[stem] for stem in stems], known)
        self.prompts = _prompts(folder / "prompts.json")
        self.sequences, single = {}, [name for name, (_, known) in found.items() if len(known) == 1]
        for name, (pictures, known) in found.items():
            if count and len(self.sequences) == count:
                break
            if len(centres := _centres(known, len(pictures))):
                self.sequences[name] = (pictures, centres)
        alone = f"{len(single)} of {len(found)} sequences have a mask of one frame alone, which says nothing of a path"
        if single and not self.sequences:
            way_out = "as in the validation sets of MOSE and YouTube-VOS; take their training sets, or DAVIS"
            raise UserError(f"{folder}: {alone}, {way_out}")
        if not self.sequences:
            raise UserError(f"{folder}: no sequence there has an object with masks in its first and a later frame")
        if single:
            warnings.warn(f"{folder}: {alone}; they are left out", stacklevel=2)
        self.names = tuple(map(_file_name, self.sequences))

    def task(self, index: int, frames: int, height: int, width: int, fps: float) -> Task:
        name, (pictures, centres) = list(self.sequences.items())[index]
        times = np.linspace(0, len(pictures) - 1, frames)
        wanted = np.round(times).astype(int)
        read = {j: read_image(pictures[j]) for j in np.unique(wanted)}
        old_height, old_width = next(iter(read.values())).shape[:2]
        scaled_height, scaled_width, top, left = cover(old_height, old_width, height, width)
        resized = {j: resize_crop(image, height, width) for j, image in read.items()}
        video = np.stack([resized[j] for j in wanted])
        low = np.floor(times).astype(int)
        share = (times - low)[:, None]
        tracks = (1 - share) * centres[:, low] + share * centres[:, np.minimum(low + 1, len(pictures) - 1)]
        tracks = ((tracks * (scaled_width, scaled_height) - (left, top)) / (width, height)).astype(np.float32)
        inside = ((tracks[:, 0] >= 0) & (tracks[:, 0] <= 1)).all(-1)  # the middle is cut out, where sides differ
        place = name.rsplit("/", 1)[-1]
        prompt = self.prompts.get(name) or self.prompts.get(place) or place.replace("-", " ").replace("_", " ")
        return Task(self.names[index], prompt, np.clip(tracks[inside], 0, 1), video)


def _pictures(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(filter(_is_picture, found))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES and not is_hidden(path)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name).lstrip(".") or "_"


def _prompts(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        prompts = json.loads(decode_text(path.read_bytes(), str(path)))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise UserError(f"{path}: should hold an object, name of a sequence -> prompt")
    return prompts


def _centres(known: Sequence[tuple[int, Path]], frames: int) -> Float[np.ndarray, "n t 2"]:
    """Centroids of the objects of the first mask that are in a later one, too: (x, y) in 0..1, at every frame."""
    first = _labels(known[0][1])
    numbers, areas = np.unique(first, return_counts=True)
    numbers = [n for n, area in zip(numbers, areas, strict=True) if n and area >= MIN_MASK * first.size]
    if len(numbers) > 1:
        numbers = [n for n in numbers if n != VOID]
    seen_at: dict[int, dict[int, np.ndarray]] = {int(n): {} for n in numbers}
    for frame, path in known if numbers else ():
        labels = _labels(path)
        for number, seen in seen_at.items():
            y, x = np.nonzero(labels == number)
            if len(x):
                seen[frame] = (np.array([x.mean(), y.mean()]) + 0.5) / labels.shape[::-1]
    at = np.arange(frames)
    tracks = [
        np.stack([np.interp(at, list(seen), [p[i] for p in seen.values()]) for i in range(2)], 1)
        for seen in seen_at.values()
        if len(seen) > 1
    ]
    return np.stack(tracks) if tracks else np.zeros((0, frames, 2))


def _labels(path: Path) -> UInt8[np.ndarray, "h w"]:
    try:
        with Image.open(files.local(path)) as image:
            return np.array(image if image.mode in ("P", "L") else image.convert("L"))
    except OSError as error:
        raise UserError(f"{path}: is no mask that can be read ({error})") from None


Benchmark = Sprites | Listed | VideoSegmentationBenchmark


def open_benchmark(config: Mapping[str, Any]) -> Benchmark:
    """The benchmark of a config: `kind` ("sprites", "segmentation" or "list"), `source`, `split`, `clips` (0 = all).

    Raises:
      UserError: there is no such kind, or its files are missing.
    """
    kind, source, count = config["kind"], config["source"], config["clips"]
    if kind == "sprites":
        return Sprites(config["split"], count, config["version"])
    if kind not in ("segmentation", "list"):
        raise UserError(f"benchmark.kind is {kind!r}; choose sprites, segmentation or list")
    if not source or not files.path(source).exists():
        raise UserError(f"benchmark.source is {source!r}; name the {'folder' if kind == 'segmentation' else 'file'}")
    if kind == "segmentation":
        return VideoSegmentationBenchmark(files.path(source), count)
    listed = Listed(files.path(source))
    listed.names = listed.names[: count or None]
    return listed
