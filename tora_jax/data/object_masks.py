"""Where objects are in the frames of a clip: from its labels, or from what moves otherwise than the camera."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, UInt8

from tora_jax.data import motion
from tora_jax.data.curate import camera
from tora_jax.errors import UserError


def object_masks(
    video: UInt8[np.ndarray, "t h w 3"], labels: UInt8[np.ndarray, "t h w"] | None = None
) -> Bool[np.ndarray, "t h w"]:
    """Pixels of objects.

    Without labels these are pixels that leave the camera's motion (`camera.object_masks`, on OpenCV's DIS flow), each
    frame compared with the next one, and the last with the one before. They miss objects that stand still, or differ
    from what is behind them in colour alone.

    Args:
      labels: 0 = background, as in `sprites.clips.Clip`; None = not known.

    Raises:
      UserError: neither labels nor a second frame say where objects are.
    """
    if labels is not None:
        return labels > 0
    if len(video) < 2:
        raise UserError("has no labels, and one frame does not show what moves; give the buckets 2 frames or more")
    there_and_back = np.concatenate([video, video[-2:-1]])
    flow = motion.dense_flow(there_and_back)[1:]
    return camera.object_masks(there_and_back, flow, [camera.camera_motion(move)[0] for move in flow])


def square_around(rng: np.random.Generator, mask: Bool[np.ndarray, "t h w"], side: int) -> tuple[int, int]:
    """Top and left of a random square that holds a random pixel of objects, in its middle half as far as frames allow.

    Args:
      mask: with at least one such pixel.
      side: of the square in pixels, at most that of the frame.
    """
    spots = np.argwhere(mask.any(0))
    spot = spots[rng.integers(len(spots))]
    offsets = rng.integers(side // 4, side - side // 4, 2)
    y, x = np.clip(spot - offsets, 0, np.array(mask.shape[1:]) - side)
    return int(y), int(x)
