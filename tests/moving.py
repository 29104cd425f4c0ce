"""Drawn clips of a moving camera and a moving object, with the truth about both."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

KINDS = (
    "still",
    "still, object",
    "pan",
    "pan, object",
    "tilt",
    "zoom",
    "zoom, object",
    "shake",
    "shake, object",
    "roll",
)
HEIGHT, WIDTH, FPS = 192, 256, 8.0


@dataclasses.dataclass(frozen=True)
class Moving:
    """`masks` are the object's pixels in each frame; `path` is the object's centre in 0..1."""

    video: np.ndarray
    camera: str
    has_object: bool
    masks: np.ndarray
    path: np.ndarray


def make(kind: str, seed: int, frames: int = 17, height: int = HEIGHT, width: int = WIDTH) -> Moving:
    rng = np.random.default_rng([KINDS.index(kind), seed])
    camera, _, _ = kind.partition(", ")
    side, t = min(height, width), np.arange(frames) / FPS
    shift, zoom, turn = np.zeros((frames, 2)), np.zeros(frames), np.zeros(frames)
    sign = rng.choice([-1, 1])
    label = {"still": "static", "shake": "shake", "roll": "roll"}.get(camera)
    speed = rng.uniform(0.08, 0.35) * side  # of the picture, pixels a second
    ease = rng.choice([1.0, 1.5])  # also at changing speed
    progress = t[-1] * (t / t[-1]) ** ease
    if camera == "pan":
        shift[:, 0] = sign * speed * progress
        label = "pan left" if sign > 0 else "pan right"
    elif camera == "tilt":
        shift[:, 1] = sign * speed * progress
        label = "tilt up" if sign > 0 else "tilt down"
    elif camera == "zoom":
        zoom = sign * rng.uniform(0.2, 0.4) * progress
        label = "zoom in" if sign > 0 else "zoom out"
    elif camera == "roll":
        turn = sign * rng.uniform(0.2, 0.4) * progress
    elif camera == "shake":
        shift = rng.uniform(-1, 1, (frames, 2)) * rng.uniform(0.015, 0.04) * side
    background = scenery(rng, 2 * height, 2 * width)
    thing = scenery(rng, height, width)
    radius = rng.uniform(0.13, 0.22, 2) * side
    while (
        True
    ):  # The object crosses the picture in its own way, not with the camera: 0.2 to 0.5 shorter sides a second.
        angle, pace = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.5) * side
        way = pace * (t[:, None] - t[-1] / 2) * [np.cos(angle), np.sin(angle)]
        own = np.linalg.norm(np.diff(way - shift, axis=0), axis=1) * FPS
        if camera == "shake" or own.min() > 0.15 * side:
            break
    path = way + [width / 2, height / 2] + rng.uniform(-0.1, 0.1, 2) * side
    tilt = np.degrees(rng.uniform(0, np.pi))
    video, masks = np.zeros((frames, height, width, 3), np.uint8), np.zeros((frames, height, width), bool)
    for j in range(frames):
        matrix = cv2.getRotationMatrix2D((0, 0), np.degrees(turn[j]), np.exp(zoom[j]))
        matrix[:, 2] = shift[j] + [width / 2, height / 2] - matrix[:, :2] @ [width, height]
        frame = cv2.warpAffine(background, matrix, (width, height), borderMode=cv2.BORDER_REFLECT)
        if "object" in kind:
            alpha = np.zeros((height, width), np.float32)
            centre, size = np.round(path[j] * 16).astype(int), np.round(radius * 16).astype(int)
            cv2.ellipse(alpha, centre, size, tilt, 0, 360, 1.0, -1, cv2.LINE_AA, 4)
            move = np.float32([[1, 0, path[j, 0] - path[0, 0]], [0, 1, path[j, 1] - path[0, 1]]])
            surface = cv2.warpAffine(thing, move, (width, height), borderMode=cv2.BORDER_REFLECT)
            frame = frame + alpha[..., None] * (surface - frame)
            masks[j] = alpha > 0.5
        video[j] = np.clip(frame + rng.normal(0, 2, frame.shape), 0, 255)
    return Moving(video, label, "object" in kind, masks, path / (width, height))


def scenery(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A picture with detail of all sizes, float32 on the 0..255 scale."""
    picture = np.zeros((height, width, 3), np.float32) + rng.uniform(60, 190, 3).astype(np.float32)
    for cell, strength in ((64, 28), (24, 20), (8, 12), (3, 8)):
        noise = rng.normal(0, strength, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        picture += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(picture, 0, 255)
