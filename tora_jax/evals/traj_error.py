"""TrajError: the distance in pixels of a generated video's points from their given paths.

A tracker takes a video and points of its first frame, and gives their places in every frame. Three have this
signature: OpenCV's pyramidal Lucas-Kanade (track_lk.py), RAFT's flow chained from frame to frame and TAPNext
(track_networks.py).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, UInt8

Video = UInt8[np.ndarray, "t h w 3"]
Points = Float[np.ndarray, "n 2"]
Tracks = Float[np.ndarray, "n t 2"]
Visible = Bool[np.ndarray, "n t"]
# (video, points in 0..1 of its first frame) -> tracks in 0..1, starting there, and whether each point is seen; the
# position of a point that is not is the last one believed in.
Tracker = Callable[[Video, Points], tuple[Tracks, Visible]]

PIXELS_WITHIN = (1, 2, 4, 8)


def traj_error(given: Tracks, tracked: Tracks, visible: Visible, size: tuple[int, int]) -> dict[str, float]:
    """Compares given paths with the tracks that a tracker found from their start points.

    Args:
      given, tracked: (x, y) in 0..1 of the frame.
      visible: of the tracker.
      size: (width, height) in whose pixels the error counts; (512, 512) in the paper.

    Returns:
      l1: the mean of |dx| + |dy| over trajectories and frames (the first one too): the paper's TrajError.
      l1_visible: the same over visible points; NaN where there are none.
      l2: the mean distance.
      endpoint: the mean distance in the last frame.
      within_1, within_2, within_4, within_8: the share of points at most so many pixels away.
      visible: the share of visible points.
    """
    off = np.abs(tracked.astype(np.float64) - given) * size
    l1, distance = off.sum(-1), np.linalg.norm(off, axis=-1)
    return {
        "l1": float(l1.mean()),
        "l1_visible": float(l1[visible].mean()) if visible.any() else float("nan"),
        "l2": float(distance.mean()),
        "endpoint": float(distance[:, -1].mean()),
        **{f"within_{limit}": float((distance <= limit).mean()) for limit in PIXELS_WITHIN},
        "visible": float(visible.mean()),
    }
