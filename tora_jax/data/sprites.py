"""Sprites: clips of moving shapes with exact tracks, flow, masks and captions, drawn from a seed.

  python -m tora_jax.data.sprites --out DIR           writes the TFDS set (ArrayRecord, no TensorFlow)

A clip has 1 to 3 objects (shapes and digits, plain or textured) that slide over a still, textured background,
along smooth or sharp paths, at changing speed, with pauses, in front of each other. They neither turn nor grow,
so tracks, labels and flow are exact. `make_clip` needs no file: clip `index` of a split is the same everywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, Float, UInt8

from tora_jax.errors import UserError
from tora_jax.io.video import write_video

SPLITS = ("train", "validation", "test", "benchmark_one", "benchmark_two")  # a clip's seed holds its split's place
SIZES_OF_SPLITS = {"train": 6000, "validation": 256, "test": 256, "benchmark_one": 64, "benchmark_two": 64}

COLOURS = {
    "red": (214, 40, 40),
    "yellow": (238, 205, 45),
    "green": (40, 165, 70),
    "blue": (45, 85, 225),
    "purple": (150, 55, 190),
    "cyan": (45, 200, 210),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPES = ("disc", "square", "triangle", "star", "ring", "cross", "heart", *DIGITS)
DIGIT_SHARE = 0.15
FILLS = ("plain", "striped", "spotted")
BACKGROUNDS = {"grey": (122, 122, 122), "brown": (138, 112, 88), "green": (98, 128, 100), "blue": (96, 114, 142)}
TEXTURES = ("waves", "stripes", "checks", "clouds")

SIZES = (0.10, 0.25)  # of an object, as a share of the frame's width
LENGTHS = (0.4, 1.0)  # of a path, as a share of the frame's width
MIN_CONTRAST = 0.12  # standard deviation of the background, on the 0..1 scale
CANVAS, EXTENT = 320, 240  # of a shape before it is scaled: pixels a side, and of its larger side


@dataclasses.dataclass(frozen=True)
class Sprite:
    """One object: `size` is its width (or height, the larger) as a share of the frame's width."""

    shape: str
    colour: str
    fill: str
    size: float

    @property
    def name(self) -> str:
        """As captions say it, such as "striped red star"."""
        return " ".join((*((self.fill,) if self.fill != "plain" else ()), self.colour, self.shape))


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip and the truth about it.

    Attributes:
      video: uint8 [t, h, w, 3].
      fps: frames per second.
      caption: such as "a red star and a striped blue disc over green waves."; the objects are named from left to right
        in the first frame, so that a prompt can say which of them takes which path.
      tracks: (x, y) of each object's centre of mass in 0..1 of the frame; pixel = x * width - 0.5.
      visible: at least half of the object is inside the frame and not covered.
      labels: uint8 [t, h, w], 0 = background, i + 1 = object i is on top.
      sprites: the objects, from back to front.
      background: such as "green waves".
    """

    video: UInt8[np.ndarray, "t h w 3"]
    fps: float
    caption: str
    tracks: Float[np.ndarray, "n t 2"]
    visible: Bool[np.ndarray, "n t"]
    labels: UInt8[np.ndarray, "t h w"]
    sprites: tuple[Sprite, ...]
    background: str


def make_clip(
    index: int, split: str = "train", seed: int = 0, size: int = 128, frames: int = 17, fps: float = 8.0
) -> Clip:
    """Draws clip `index` of a split.

    "benchmark_one" and "benchmark_two" are the benchmark set: one object, or two that never cover each other.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    if split.startswith("benchmark"):
        count = 1 if split == "benchmark_one" else 2
    else:
        count = int(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))
    texture, tone = str(rng.choice(TEXTURES)), str(rng.choice(list(BACKGROUNDS)))
    # An object in the background's own colour would be hard to see.
    colours = rng.choice([name for name in COLOURS if name != tone], count, replace=False)
    sprites = tuple(_sprite(rng, str(colour)) for colour in colours)
    tracks = _tracks(rng, sprites, frames, apart=split == "benchmark_two")
    video, labels, visible = _render(rng, sprites, tracks, _background(rng, texture, tone, size))
    names = [f"a {sprites[i].name}" for i in np.argsort(tracks[:, 0, 0])]
    listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    background = f"{tone} {texture}"
    caption = f"{listed} over {background}."
    return Clip(video, fps, caption, tracks, visible, labels, sprites, background)


def dense_flow(labels: UInt8[np.ndarray, "t h w"], tracks: Float[np.ndarray, "n t 2"]) -> Float[np.ndarray, "t h w 2"]:
    """The exact flow of a clip in pixels; as in `flow`, that from frame j - 1 to j stands in frame j."""
    t, h, w = labels.shape
    steps = np.zeros((t, len(tracks) + 1, 2), np.float32)  # row 0: the background
    steps[1:, 1:] = (np.diff(tracks, axis=1) * (w, h)).transpose(1, 0, 2)
    flow = np.zeros((t, h, w, 2), np.float32)
    for j in range(1, t):
        flow[j] = steps[j][labels[j - 1]]
    return flow


@functools.cache
def shape_mask(shape: str) -> Float[np.ndarray, "side side"]:
    """A shape on its canvas, 0..1: the larger side is EXTENT pixels, the centre of mass is the canvas's centre."""
    drawn = np.zeros((1024, 1024), np.uint8)
    if shape in DIGITS:
        place = {"fontFace": cv2.FONT_HERSHEY_DUPLEX, "fontScale": 20, "thickness": 110}
        cv2.putText(drawn, str(DIGITS.index(shape)), (280, 730), color=255, **place)
    else:
        cv2.fillPoly(drawn, [np.round(_outline(shape) * 400 + 512).astype(np.int32)], 255)
        if shape == "ring":
            cv2.circle(drawn, (512, 512), 200, 0, -1)
    y, x = np.nonzero(drawn)
    scale = EXTENT / max(np.ptp(x), np.ptp(y))
    centre = np.array([x.mean(), y.mean()])
    matrix = np.column_stack([np.eye(2) * scale, (CANVAS - 1) / 2 - scale * centre])
    return cv2.warpAffine(drawn, matrix, (CANVAS, CANVAS), flags=cv2.INTER_AREA).astype(np.float32) / 255


def _outline(shape: str) -> Float[np.ndarray, "n 2"]:
    """Corners of a shape, about -1..1."""
    turn = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    circle = np.stack([np.sin(turn), -np.cos(turn)], 1)
    if shape in ("disc", "ring"):
        return circle
    if shape == "triangle":
        return circle[::60]
    if shape == "square":
        return np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])
    if shape == "star":
        return circle[::18] * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]
    if shape == "cross":
        a = 0.36
        quarter = np.array([(-a, -1), (a, -1), (a, -a)])
        turned = np.array([(0, 1), (-1, 0)])
        return np.concatenate([quarter @ np.linalg.matrix_power(turned, k) for k in range(4)])
    if shape == "heart":
        height = sum(a * np.cos(k * turn) for k, a in ((1, 13), (2, -5), (3, -2), (4, -1)))
        return np.stack([np.sin(turn) ** 3, -height / 16], 1)
    raise ValueError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")


def _sprite(rng: np.random.Generator, colour: str) -> Sprite:
    kinds = DIGITS if rng.random() < DIGIT_SHARE else SHAPES[: -len(DIGITS)]
    fill = rng.choice(FILLS, p=(0.7, 0.15, 0.15))
    return Sprite(str(rng.choice(kinds)), colour, str(fill), float(rng.uniform(*SIZES)))


def _background(rng: np.random.Generator, texture: str, tone: str, size: int) -> Float[np.ndarray, "h w 3"]:
    """A picture on the 0..255 scale. Lengths are shares of the side, so that the sizes show the same scene."""
    y, x = np.mgrid[:size, :size] / size
    angle, length = rng.uniform(0, np.pi), rng.uniform(0.18, 0.34)
    phases = rng.uniform(0, 2 * np.pi, 3)
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    length *= 1.3 if texture == "checks" else 1.0
    u, v = (2 * np.pi * side / length + phase for side, phase in zip((along, across), phases, strict=False))
    if texture == "waves":
        field = np.sin(u + 1.2 * np.sin(2 * np.pi * across / 0.6 + phases[2]))
    elif texture == "stripes":
        field = np.tanh(2.5 * np.sin(u))
    elif texture == "checks":
        field = np.tanh(2.5 * np.sin(u) * np.sin(v))
    else:
        cells = rng.standard_normal((8, 8)).astype(np.float32)
        field = cv2.resize(cells, (size, size), interpolation=cv2.INTER_CUBIC)
    field = np.clip((field - field.mean()) / field.std(), -2, 2)
    # The tone's lightness goes up and down; grey 122 +- 0.30 * 122 has a deviation of 0.14.
    return np.array(BACKGROUNDS[tone]) * (1 + 0.30 * field[..., None] / field.std())


def _tracks(
    rng: np.random.Generator, sprites: tuple[Sprite, ...], frames: int, apart: bool
) -> Float[np.ndarray, "n t 2"]:
    """A path for each sprite; `apart`: no two of them ever come closer than their outer circles."""
    while True:
        tracks = np.stack([_path(rng, sprite.size, frames) for sprite in sprites])
        reach = 0.75 * sum(sprite.size for sprite in sprites)
        if not apart or np.linalg.norm(tracks[0] - tracks[1], axis=-1).min() > reach:
            return tracks.astype(np.float32)


def _path(rng: np.random.Generator, size: float, frames: int) -> Float[np.ndarray, "t 2"]:
    """A random path inside the frame. A third of them have a pause or sharp turns."""
    margin = 0.55 * size
    kind = rng.choice(["line", "curve", "circle", "zigzag", "pause"], p=[0.2, 0.3, 0.17, 0.165, 0.165])
    while True:
        if kind == "circle":
            radius, start = rng.uniform(0.12, 0.3), rng.uniform(0, 2 * np.pi)
            turn = start + rng.choice([-1, 1]) * np.linspace(0, rng.uniform(0.6, 1) * 2 * np.pi, 64)
            points = rng.uniform(margin + radius, 1 - margin - radius, 2) if margin + radius < 0.5 else np.full(2, 0.5)
            points = points + radius * np.stack([np.cos(turn), np.sin(turn)], 1)
        else:
            corners = {"line": 2, "zigzag": rng.integers(3, 5)}.get(kind, rng.integers(2, 5))
            points = rng.uniform(margin, 1 - margin, (corners, 2))
            if kind != "zigzag":
                points = _rounded(points)
        steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
        inside = margin <= points.min() and points.max() <= 1 - margin
        if LENGTHS[0] <= steps.sum() <= LENGTHS[1] and inside:
            break
    times = _timing(rng, frames, pause=kind == "pause")
    travelled = np.concatenate([[0], np.cumsum(steps)]) / steps.sum()
    return np.stack([np.interp(times, travelled, points[:, i]) for i in range(2)], 1)


def _rounded(points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "m 2"]:
    """Chaikin's corner cutting: a smooth curve with the same ends."""
    for _ in range(4 if len(points) > 2 else 0):
        cut = np.stack([0.75 * points[:-1] + 0.25 * points[1:], 0.25 * points[:-1] + 0.75 * points[1:]], 1)
        points = np.concatenate([points[:1], cut.reshape(-1, 2), points[-1:]])
    return points


def _timing(rng: np.random.Generator, frames: int, pause: bool) -> Float[np.ndarray, "t"]:
    """The share of the path travelled at each frame, from 0 to 1."""
    t = np.linspace(0, 1, frames)
    if pause:
        length = rng.uniform(0.2, 0.35)
        start = rng.uniform(0.15, 0.85 - length)
        return np.interp(t, [0, start, start + length, 1], [0, start / (1 - length), start / (1 - length), 1])
    profile = rng.choice(["steady", "ease", "speed up", "slow down"], p=[0.4, 0.2, 0.2, 0.2])
    if profile == "ease":
        return t * t * (3 - 2 * t)
    return {"steady": t, "speed up": t**1.6, "slow down": 1 - (1 - t) ** 1.6}[str(profile)]


def _texture(rng: np.random.Generator, fill: str) -> Float[np.ndarray, "side side"]:
    """What a sprite's colour is multiplied by, on its canvas."""
    y, x = np.mgrid[:CANVAS, :CANVAS] * (2 * np.pi / (0.36 * EXTENT))
    angle = rng.uniform(0, np.pi)
    wave = np.sin(np.cos(angle) * x + np.sin(angle) * y)
    if fill == "plain":
        return np.ones((CANVAS, CANVAS), np.float32)
    if fill == "spotted":
        wave = wave * np.sin(np.cos(angle) * y - np.sin(angle) * x) * 1.5
    return (0.8 + 0.2 * np.tanh(2.5 * wave)).astype(np.float32)


def _render(
    rng: np.random.Generator,
    sprites: tuple[Sprite, ...],
    tracks: Float[np.ndarray, "n t 2"],
    background: Float[np.ndarray, "h w 3"],
) -> tuple[UInt8[np.ndarray, "t h w 3"], UInt8[np.ndarray, "t h w"], Bool[np.ndarray, "n t"]]:
    size, (n, t) = len(background), tracks.shape[:2]
    video = np.repeat(background[None].astype(np.float32), t, 0)
    labels = np.zeros((t, size, size), np.uint8)
    areas = np.zeros((n, t))
    for i, sprite in enumerate(sprites):
        # Half-way down by area average, then bilinear: each pixel sees all of the canvas that it covers.
        scale = sprite.size * size / EXTENT
        side = max(round(2 * scale * CANVAS), 1)
        pair = np.stack([shape_mask(sprite.shape), _texture(rng, sprite.fill)], -1)
        small = cv2.resize(pair, (side, side), interpolation=cv2.INTER_AREA)
        step = scale * CANVAS / side
        for j in range(t):
            corner = tracks[i, j] * size - 0.5 - step * (side - 1) / 2
            matrix = np.array([[step, 0, corner[0]], [0, step, corner[1]]], np.float64)
            alpha, shade = np.moveaxis(cv2.warpAffine(small, matrix, (size, size), flags=cv2.INTER_LINEAR), -1, 0)
            colour = np.array(COLOURS[sprite.colour], np.float32) * np.maximum(shade, 0.6)[..., None]
            video[j] += alpha[..., None] * (colour - video[j])
            labels[j][alpha > 0.5] = i + 1
            areas[i, j] = (alpha > 0.5).sum()
    shown = np.stack([(labels == i + 1).sum((1, 2)) for i in range(n)])
    return np.clip(np.round(video), 0, 255).astype(np.uint8), labels, shown >= 0.5 * np.maximum(areas, 1)


# ----------------------------------------------------------------------------------------------------------
# The dataset
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Scale(tfds.core.BuilderConfig):
    """One set of clips: `side` pixels, `frames`, the seed, and how many clips each split has."""

    side: int = 128
    frames: int = 17
    fps: float = 8.0
    seed: int = 0
    clips: Mapping[str, int] = dataclasses.field(default_factory=lambda: SIZES_OF_SPLITS)


class Sprites(tfds.core.GeneratorBasedBuilder):
    """The clips as records: what `Clip` holds, with the video as mp4 bytes."""

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES: ClassVar = {
        "1.1.0": "Captions name the objects from left to right.",
        "1.0.0": "First version.",
    }

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "video": tfds.features.Tensor(shape=(), dtype=np.object_),
                    "fps": tfds.features.Scalar(np.float32),
                    "caption": text(),
                    "tracks": tfds.features.Tensor(shape=(None, None, 2), dtype=np.float32, encoding="zlib"),
                    "visible": tfds.features.Tensor(shape=(None, None), dtype=np.bool_, encoding="zlib"),
                    "labels": tfds.features.Tensor(shape=(None, None, None), dtype=np.uint8, encoding="zlib"),
                    "objects": tfds.features.Sequence(
                        {"shape": text(), "colour": text(), "fill": text(), "size": np.float32}
                    ),
                    "background": text(),
                }
            ),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split, count) for split, count in self.builder_config.clips.items()}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        one = functools.partial(_record, split, dataclasses.replace(self.builder_config, clips={}))
        with multiprocessing.get_context("spawn").Pool() as pool:
            yield from pool.imap(one, range(count), chunksize=8)


def _record(split: str, scale: Scale, index: int) -> tuple[int, dict[str, Any]]:
    clip = make_clip(index, split, scale.seed, scale.side, scale.frames, scale.fps)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, clip.video, clip.fps)
        video = path.read_bytes()
    return index, {
        "video": video,
        "fps": clip.fps,
        "caption": clip.caption,
        "tracks": clip.tracks,
        "visible": clip.visible,
        "labels": clip.labels,
        "objects": [dataclasses.asdict(sprite) for sprite in clip.sprites],
        "background": clip.background,
    }


def build(folder: str | Path, scale: Scale | None = None) -> Path:
    """Writes the set under a folder, unless it is there.

    Returns:
      the folder of the version, for `tfds.builder_from_directory` and the `sources` of a training config.

    Raises:
      UserError: when the folder cannot be written.
    """
    try:
        builder = Sprites(data_dir=str(folder), config=scale or Scale(name="sprites"))
        builder.download_and_prepare(file_format="array_record")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); choose another folder") from error
    return Path(builder.data_dir)


def main(argv: list[str] | None = None) -> int:
    """`python -m tora_jax.data.sprites`"""
    parser = argparse.ArgumentParser(prog="python -m tora_jax.data.sprites", description="Writes the sprites set.")
    parser.add_argument("--out", required=True, help="folder for TFDS data")
    parser.add_argument("--train", type=int, default=SIZES_OF_SPLITS["train"], help="clips to train on")
    parser.add_argument("--side", type=int, default=Scale.side, help="pixels")
    parser.add_argument("--frames", type=int, default=Scale.frames)
    parser.add_argument("--seed", type=int, default=Scale.seed)
    args = parser.parse_args(argv)
    for name in ("train", "side", "frames"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    clips = {**SIZES_OF_SPLITS, "train": args.train}
    name = f"{args.side}x{args.frames}x{args.train}_seed{args.seed}"
    try:
        print(build(args.out, Scale(name=name, side=args.side, frames=args.frames, seed=args.seed, clips=clips)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
