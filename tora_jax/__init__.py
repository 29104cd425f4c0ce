"""Tora, a trajectory-controlled video diffusion transformer, in JAX and Flax.

    from tora_jax import generate, load

    models = load()
    video = generate(models, "a red star over blue waves.", trajectories="circle").video

docs/api.md has more. Importing this package loads nothing heavy; the first call does.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tora_jax.backbones.assembly import Models
    from tora_jax.sampling.generate import Result

__all__ = ["generate", "load"]


def load(
    weights: str | PathLike | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
    low_memory: bool = False,
    eight_bit: bool = False,
) -> Models:
    """Loads a model.

    Args:
      weights: a release folder; None = the small model's weights, which ship with the package.
      config: plain nested dict, in place of the weights' own; with `weights=None`, random weights of this config.
      seed: of random weights.
      low_memory: the weights stay in the host's memory, and each part is on the device only while it is used.
      eight_bit: the denoiser's kernels in 8 bits: half of its memory, and a video that differs a little. CogVideoX's
        weights have this form.

    Raises:
      tora_jax.errors.UserError: the folder is missing, broken, or does not fit the config.
    """
    from tora_jax.backbones import assembly
    from tora_jax.checkpoints import release

    return assembly.load(
        config, release.DEMO if weights is None and config is None else weights, seed, low_memory, eight_bit
    )


def generate(
    models: Models,
    prompt: str | list[str] | None = None,
    trajectories: Any = None,
    conditions: Mapping[int, Any] | None = None,
    **settings: Any,
) -> Result:
    """Makes a video.

    Args:
      models: of `load`.
      prompt: what the video shows; several are shared out among the segments of a long video; None = the weights' own.
      trajectories: a file, the name of a preset, points [[x, y], ...] or [[x, y, t], ...] on a 256x256 canvas, or a
        list of one of these kinds; None = no trajectory.
      conditions: frame -> an image or video file, uint8 pixels [h, w, 3] or [n, h, w, 3], or (one of them, edit ratio).
        Negative frames count from the end; a clip there ends at it.
      settings: as the flags of sample.py (docs/sampling.md): num_frames, height, width, fps, steps, guidance,
        trajectory_guidance, trajectory_canvas ("image": drawn on the given picture), trajectory_axes, trajectory_times,
        trajectory_tracks, negative_prompt, seed, segment, overlap, aesthetic_score, motion_score, camera_motion;
        also `progress`, a function called after each step with the number of steps done and with a function that gives
        the estimate of the clean latents [1, t, h, w, c], if it is called at once; what `progress` raises stops the
        generation.

    Returns:
      video: uint8 [frames, height, width, 3]; motion: the trajectory map in the same form, None without a trajectory;
      seconds: of each part.

    Raises:
      tora_jax.errors.UserError: for a value that cannot be.
    """
    from tora_jax.conditioning import images
    from tora_jax.sampling import request, segments

    progress = settings.pop("progress", None)
    given = settings | ({} if prompt is None else {"prompt": prompt})
    placed = [
        images.Condition(frame, *(item if isinstance(item, tuple) else (item,)))
        for frame, item in (conditions or {}).items()
    ]
    wanted = request.make(models.sampling, given | {"trajectories": trajectories, "conditions": placed})
    return segments.joined([piece for (piece,) in request.generate(models, [wanted], progress=progress)])
