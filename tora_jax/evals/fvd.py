"""FVD, the Frechet Video Distance (arXiv 1812.01717): how far apart two sets of videos are, as I3D sees them.

  fit a Gaussian to I3D's logits of each set; |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

The logits are those of Kinetics-400, averaged over time, of whole clips resized to 224x224 (not cropped).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, UInt8

from tora_jax.checkpoints import release
from tora_jax.errors import UserError
from tora_jax.io.video import to_float
from tora_jax.models.i3d import I3D, MIN_FRAMES, SIZE

Video = UInt8[np.ndarray, "t h w 3"]
# A video of at least MIN_FRAMES frames -> its features.
Features = Callable[[Video], Float[np.ndarray, "d"]]


def load(folder: str | Path) -> Features:
    """Loads the features from a folder of `python -m convert_weights i3d`.

    Raises:
      UserError: the folder is missing or broken.
    """
    model, params = release.load_model(folder, "i3d", I3D)
    run = jax.jit(lambda params, video: model.apply({"params": params}, video).logits[0])

    def features(video: Video) -> Float[np.ndarray, "d"]:
        if len(video) < MIN_FRAMES:
            raise UserError(f"FVD needs videos of at least {MIN_FRAMES} frames; this one has {len(video)}")
        return np.asarray(run(params, resize(video)[None]))

    return features


def resize(video: Video, side: int = SIZE) -> Float[np.ndarray, "t side side 3"]:
    """Pixels in [-1, 1], resized as TensorFlow 1 does, as for every published FVD.

    Bilinear without antialiasing, and pixel i of the result is read at i * (old side / new side): the
    upper left corners agree, not the centres (`tf.image.resize_bilinear`, align_corners=False).
    """
    x = to_float(video)
    for axis in (2, 1):
        old = x.shape[axis]
        at = np.arange(side, dtype=np.float32) * np.float32(old / side)
        low = at.astype(int)
        share = (at - low.astype(np.float32)).reshape(-1, *(1,) * (3 - axis))
        first, second = x.take(low, axis), x.take(np.minimum(low + 1, old - 1), axis)
        x = first + (second - first) * share
    return x


def frechet_distance(first: Float[np.ndarray, "n d"], second: Float[np.ndarray, "m d"]) -> float:
    """The Frechet distance between the Gaussians that fit two sets of features; float64.

    The trace of (S1 S2)^(1/2) is the sum of the singular values of R1 R2^T, where S = R^T R. Unlike the square root
    of the product itself this is exact for sets that are smaller than the features are wide.

    Warns:
      a set has no more members than the features have numbers: its covariance is singular then, and the distance
      is biased upwards. Compare only sets of one size.

    Raises:
      UserError: for a set of fewer than two, or features that are not finite.
    """
    count, width = min(len(first), len(second)), first.shape[1]
    if count < 2:
        raise UserError(f"the Frechet distance needs at least 2 videos in each set; there are {count}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise UserError("the features of a video are not finite")
    if count <= width:
        warnings.warn(
            f"FVD from {count} videos, {width} features each: biased upwards; compare only with the same number",
            stacklevel=2,
        )
    means, roots, total = [], [], 0.0
    for features in (first.astype(np.float64), second.astype(np.float64)):
        means.append(features.mean(0))
        centred = (features - means[-1]) / np.sqrt(len(features) - 1)
        roots.append(np.linalg.qr(centred, mode="r"))
        total += np.square(centred).sum()
    apart = np.square(means[0] - means[1]).sum()
    return float(max(apart + total - 2 * np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum(), 0))
