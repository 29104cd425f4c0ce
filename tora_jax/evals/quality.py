"""Metrics of pixels: PSNR and SSIM against a true video; flicker and motion of a video alone."""

from __future__ import annotations

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Num, UInt8

from tora_jax.data import motion

Video = UInt8[np.ndarray, "t h w 3"]
Clips = np.ndarray | jax.Array

SIGMA, WINDOW = 1.5, 11  # of SSIM's Gaussian, in pixels
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(
    video: Num[Clips, "*b t h w 3"], truth: Num[Clips, "*b t h w 3"], span: float = 255
) -> Num[Clips, "*b"] | float:
    """The peak signal-to-noise ratio in dB, from the squared error of each whole clip; 100 for equal ones.

    Args:
      video, truth: NumPy's are compared in float64, JAX's as they are.
      span: from black to white: 255 of uint8, 2 of pixels in [-1, 1].
    """
    xp = jnp if isinstance(video, jax.Array) else np
    error = xp.square(video - truth if xp is jnp else video.astype(np.float64) - truth)
    error = error.reshape(*truth.shape[:-4], -1).mean(-1) / span**2
    return -10 * xp.log10(xp.maximum(error, 1e-10))


def ssim(video: Video, truth: Video) -> float:
    """Structural similarity (Wang et al. 2004), mean over the pixels, colours and frames; 1 for equal videos.

    Gaussian windows of 11 pixels, population moments, and the border left out in which a window is cut (in frames
    that are large enough for one).
    """

    def blur(image: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(image, (WINDOW, WINDOW), SIGMA)

    edge = WINDOW // 2 if min(video.shape[1:3]) >= WINDOW else 0
    inside = slice(edge, -edge or None)
    means = []
    for x, y in zip(video.astype(np.float64), truth.astype(np.float64), strict=True):
        mx, my = blur(x), blur(y)
        vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
        map_ = (2 * mx * my + C1) * (2 * vxy + C2) / ((mx * mx + my * my + C1) * (vx + vy + C2))
        means.append(map_[inside, inside].mean())
    return float(np.mean(means))


def steadiness(video: Video) -> dict[str, float]:
    """Flicker and motion of a video, both by its optical flow (DIS).

    Returns:
      flicker: mean absolute difference, 0..255, between a frame and the next one brought back along the flow: what
        changes without moving. 0 for a single frame.
      motion: mean length of the flow, in % of the shorter side for each frame.
    """
    if len(video) < 2:
        return {"flicker": 0.0, "motion": 0.0}
    height, width = video.shape[1:3]
    maps = motion.dense_flow(video)[1:]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    changes = []
    for before, after, (u, v) in zip(video[:-1], video[1:], np.moveaxis(maps, -1, 1), strict=True):
        back = cv2.remap(after, x + u, y + v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        changes.append(cv2.absdiff(before, back).mean())
    lengths = np.linalg.norm(maps, axis=-1).mean()
    return {"flicker": float(np.mean(changes)), "motion": float(100 * lengths / min(height, width))}
