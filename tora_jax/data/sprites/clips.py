"""Clips of sprites, with the truth about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from tora_jax.data.sprites import paths, shapes


@dataclasses.dataclass(frozen=True)
class World:
    """What clips show.

    Attributes:
      splits: name -> how many clips are written; a clip's seed holds its split's place, so new ones go to the end.
      digits: their share of the objects; in the split of that name there is nothing else.
      sizes: of the objects, smallest and largest, as shares of the frame's width.
      key: goes into each clip's seed after all else.
    """

    splits: Mapping[str, int]
    digits: float
    sizes: tuple[float, float]
    key: tuple[int, ...] = ()


SPLITS = {"train": 6000, "validation": 256, "test": 256, "benchmark_one": 64, "benchmark_two": 64}
WORLDS = {
    1: World(SPLITS, digits=0.15, sizes=(0.10, 0.25)),
    2: World({**SPLITS, "digits": 256}, digits=0.0, sizes=(0.14, 0.30), key=(2,)),
}


@dataclasses.dataclass(frozen=True)
class Sprite:
    """One object; `size` is the larger of its width and its height, as a share of the frame's width."""

    shape: str
    colour: str
    fill: str
    size: float

    @property
    def name(self) -> str:
        """The name in captions, such as "striped red star"."""
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
    index: int,
    split: str = "train",
    seed: int = 0,
    size: int = 128,
    frames: int = 17,
    fps: float = 8.0,
    version: int = 1,
) -> Clip:
    """Draws clip `index` of a split of a version of the set, one of WORLDS.

    "benchmark_one" and "benchmark_two" are the benchmark set: one object, or two that never cover each other.
    """
    world = WORLDS[version]
    rng = np.random.default_rng([seed, list(world.splits).index(split), index, *world.key])
    if split.startswith("benchmark"):
        count = 1 if split == "benchmark_one" else 2
    else:
        count = int(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))
    texture, tone = str(rng.choice(shapes.TEXTURES)), str(rng.choice(list(shapes.BACKGROUNDS)))
    # An object in the background's own colour would be hard to see.
    colours = rng.choice([name for name in shapes.COLOURS if name != tone], count, replace=False)
    digits = 1.0 if split == "digits" else world.digits
    sprites = tuple(_sprite(rng, str(colour), digits, world.sizes) for colour in colours)
    tracks = paths.draw_tracks(rng, [sprite.size for sprite in sprites], frames, apart=split == "benchmark_two")
    video, labels, visible = _render(rng, sprites, tracks, shapes.draw_background(rng, texture, tone, size))
    names = [f"a {sprites[i].name}" for i in np.argsort(tracks[:, 0, 0])]
    listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    background = f"{tone} {texture}"
    caption = f"{listed} over {background}."
    return Clip(video, fps, caption, tracks, visible, labels, sprites, background)


def exact_flow(labels: UInt8[np.ndarray, "t h w"], tracks: Float[np.ndarray, "n t 2"]) -> Float[np.ndarray, "t h w 2"]:
    """The exact flow of a clip in pixels: the flow from frame j - 1 to j stands in frame j, as in `motion_maps`."""
    t, h, w = labels.shape
    steps = np.zeros((t, len(tracks) + 1, 2), np.float32)  # row 0: the background
    steps[1:, 1:] = (np.diff(tracks, axis=1) * (w, h)).transpose(1, 0, 2)
    flow = np.zeros((t, h, w, 2), np.float32)
    for j in range(1, t):
        flow[j] = steps[j][labels[j - 1]]
    return flow


def _sprite(rng: np.random.Generator, colour: str, digits: float, sizes: tuple[float, float]) -> Sprite:
    kinds = shapes.DIGITS if rng.random() < digits else shapes.SHAPES[: -len(shapes.DIGITS)]
    fill = rng.choice(shapes.FILLS, p=(0.7, 0.15, 0.15))
    return Sprite(str(rng.choice(kinds)), colour, str(fill), float(rng.uniform(*sizes)))


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
        scale = sprite.size * size / shapes.EXTENT
        side = max(round(2 * scale * shapes.CANVAS), 1)
        pair = np.stack([shapes.shape_mask(sprite.shape), shapes.fill_texture(rng, sprite.fill)], -1)
        small = cv2.resize(pair, (side, side), interpolation=cv2.INTER_AREA)
        step = scale * shapes.CANVAS / side
        for j in range(t):
            corner = tracks[i, j] * size - 0.5 - step * (side - 1) / 2
            matrix = np.array([[step, 0, corner[0]], [0, step, corner[1]]], np.float64)
            alpha, shade = np.moveaxis(cv2.warpAffine(small, matrix, (size, size), flags=cv2.INTER_LINEAR), -1, 0)
            colour = np.array(shapes.COLOURS[sprite.colour], np.float32) * np.maximum(shade, 0.6)[..., None]
            video[j] += alpha[..., None] * (colour - video[j])
            labels[j][alpha > 0.5] = i + 1
            areas[i, j] = (alpha > 0.5).sum()
    shown = np.stack([(labels == i + 1).sum((1, 2)) for i in range(n)])
    return np.clip(np.round(video), 0, 255).astype(np.uint8), labels, shown >= 0.5 * np.maximum(areas, 1)
