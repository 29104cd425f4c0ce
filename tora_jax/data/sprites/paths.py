"""Where sprites go: random paths inside the frame, at changing speed, some of them with pauses or sharp turns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

LENGTHS = (0.4, 1.0)  # of a path, as a share of the frame's width


def draw_tracks(
    rng: np.random.Generator, sizes: Sequence[float], frames: int, apart: bool
) -> Float[np.ndarray, "n t 2"]:
    """A path for each sprite, (x, y) in 0..1 of the frame.

    Args:
      sizes: of the sprites, as shares of the frame's width.
      apart: the two sprites never come closer than their outer circles.
    """
    while True:
        tracks = np.stack([_path(rng, size, frames) for size in sizes])
        reach = 0.75 * sum(sizes)
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
