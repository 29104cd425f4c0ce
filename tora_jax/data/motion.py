"""Motion inputs of training clips: dense flow, or a few tracks."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from tora_jax.conditioning.motion_maps import displacement_maps, flow_to_rgb, follow
from tora_jax.data.sprites.clips import exact_flow

KINDS = ("none", "dense", "sparse", "mixed")
ORIGINS = ("given", "flow")  # of sparse tracks
GRID = 32 / 480  # of the start points, as a share of the shorter side: Tora's 32 pixels at 480p

Video = UInt8[np.ndarray, "t h w 3"]
Labels = UInt8[np.ndarray, "t h w"]
Flow = Float[np.ndarray, "t h w 2"]
Tracks = Float[np.ndarray, "n t 2"]
Visible = Bool[np.ndarray, "n t"]
Chosen = tuple[Float[np.ndarray, "m t 2"], Bool[np.ndarray, "m t"]]


def dense_flow(video: Video, labels: Labels | None = None, tracks: Tracks | None = None) -> Flow:
    """Flow between the frames, in pixels: frame j holds the flow from frame j - 1, and frame 0 is zero.

    It is exact where labels and tracks are given (of objects that only translate), and OpenCV's DIS elsewhere.
    """
    if labels is not None and tracks is not None:
        return exact_flow(labels, tracks)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video]
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    maps = np.zeros((*video.shape[:3], 2), np.float32)
    for j in range(1, len(video)):
        maps[j] = search.calc(grey[j - 1], grey[j], None)
    return maps


def choose_tracks(rng: np.random.Generator, tracks: Tracks, visible: Visible, most: int) -> Chosen:
    """Draws 1 to `most` of the tracks that are seen moving, or as many as there are."""
    moves = (np.abs(np.diff(tracks, axis=1)).max(-1) > 0) & visible[:, 1:] & visible[:, :-1]
    seen = np.flatnonzero(moves.any(-1))
    chosen = np.sort(rng.permutation(seen)[: rng.integers(1, most + 1)])
    return tracks[chosen], visible[chosen]


def draw_tracks(rng: np.random.Generator, maps: Flow, most: int, labels: Labels | None = None) -> Chosen:
    """Draws 1 to `most` tracks that follow the flow, from points of the first frame; none where nothing moves.

    The points are drawn from a grid, with a probability proportional to the length of the path from there. With labels
    they lie inside moving objects; where no point of the grid does, all pixels of these objects make the grid.

    Source: Tora, section 4.1, with the mean over the clip in place of one frame's flow, so that objects that pause at
    first count, too.
    """
    height, width = maps.shape[1:3]
    step = max(round(GRID * min(height, width)), 1)
    y, x = np.mgrid[step // 2 : height : step, step // 2 : width : step].reshape(2, -1)
    if labels is not None:
        moving = np.isin(labels[0], np.unique(labels[:-1][(maps[1:] != 0).any(-1)])) & (labels[0] > 0)
        inside = moving[y, x]
        y, x = (y[inside], x[inside]) if inside.any() else np.nonzero(moving)
    points = (np.stack([x, y], -1) + 0.5) / (width, height)
    tracks, visible = follow(maps[1:], points.astype(np.float32))
    lengths = np.linalg.norm(np.diff(tracks, axis=1) * (width, height), axis=-1).sum(-1)
    count = min(int(rng.integers(1, most + 1)), np.count_nonzero(lengths))
    if not count:
        return tracks[:0], visible[:0]
    chosen = rng.choice(len(points), count, replace=False, p=lengths / lengths.sum())
    return tracks[chosen], visible[chosen]


def motion_maps(
    rng: np.random.Generator,
    kind: str,
    origin: str,
    most: int,
    video: Video,
    labels: Labels | None = None,
    tracks: Tracks | None = None,
    visible: Visible | None = None,
    draws: int = 1,
) -> UInt8[np.ndarray, "draws t h w 3"]:
    """Independent draws of a clip's motion input, as RGB maps.

    Args:
      kind: "dense", "sparse" or, half and half, "mixed".
      origin: of sparse tracks: "given" with the clip, or followed through its "flow"; without given ones always so.
      most: sparse tracks, at most.
      labels, tracks: of the clip, where they are known.
      visible: where a track is seen; None = everywhere.
      draws: number of maps.
    """
    given = origin == "given" and tracks is not None
    if given and visible is None:
        visible = np.ones(tracks.shape[:2], bool)
    # The kinds are drawn first, to learn whether dense flow, the costly part, is needed; one flow serves all draws.
    kinds = [("dense", "sparse")[rng.integers(2)] if kind == "mixed" else kind for _ in range(draws)]
    dense = None if given and "dense" not in kinds else dense_flow(video, labels, tracks)

    def draw(kind: str) -> Flow:
        if kind == "dense":
            return dense
        chosen = choose_tracks(rng, tracks, visible, most) if given else draw_tracks(rng, dense, most, labels)
        return displacement_maps(chosen[0], *video.shape[1:3], chosen[1])

    return np.stack([flow_to_rgb(draw(kind)) for kind in kinds])
