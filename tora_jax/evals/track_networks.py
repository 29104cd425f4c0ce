"""Tracks by networks: RAFT's flow chained from frame to frame, and TAPNext."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from tora_jax.conditioning import motion_maps
from tora_jax.errors import UserError
from tora_jax.evals.traj_error import Points, Tracker, Tracks, Video, Visible
from tora_jax.io import files
from tora_jax.io.video import to_float
from tora_jax.models.raft import RAFT, STRIDE

MIN_SIDE = 256  # pixels of the shorter side that RAFT is given
TAPNEXT_SIDE = 256  # pixels; its position embedding has this size


def raft_tracker(model: RAFT, params: Mapping[str, Any]) -> Tracker:
    """A tracker that carries points along RAFT's flow from each frame to the next.

    A point is lost for good where the flow back does not return it to about where it came from (the usual bound,
    |forward + back|^2 < 0.01 (|forward|^2 + |back|^2) + 0.5), because what covers it carries it along.

    Args:
      model, params: such as the converter gives (`python -m convert_weights raft`).
    """

    @jax.jit
    def both_ways(params, first, second):
        there, back = jnp.concatenate([first, second]), jnp.concatenate([second, first])
        return model.apply({"params": params}, there, back)

    def track(video: Video, points: Points) -> tuple[Tracks, Visible]:
        height, width = video.shape[1:3]
        # It sees an eighth of each side, and small videos would leave it too little.
        scale = max(MIN_SIDE / min(height, width), 1)
        height, width = (round(side * scale / STRIDE) * STRIDE for side in (height, width))
        resized = [cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC) for frame in video]
        frames = [to_float(frame[None]) for frame in resized]
        flows = [np.asarray(both_ways(params, *pair)) for pair in itertools.pairwise(frames)]
        flows = np.stack(flows) if flows else np.zeros((0, 2, height, width, 2), np.float32)
        tracks, visible = motion_maps.follow(flows[:, 0], points)
        pixels = tracks * np.float32([width, height]) - np.float32(0.5)
        for j, (_, back) in enumerate(flows):
            forward = pixels[:, j + 1] - pixels[:, j]
            back = cv2.remap(back, *pixels[None, :, j + 1].transpose(2, 0, 1), cv2.INTER_LINEAR)[0]
            bound = 0.01 * (np.square(forward).sum(-1) + np.square(back).sum(-1)) + 0.5
            visible[:, j + 1] &= visible[:, j] & (np.square(forward + back).sum(-1) < bound)
        return tracks, visible

    return track


def _tapnet() -> tuple[ModuleType, ModuleType]:
    """The modules of tapnet that hold TAPNext, imported where its two dependencies have the names that it expects.

    It wants recurrentgemma's modules under `_src`, where no released version has them, and a module of gemma that only
    an ablation uses.
    """
    inside = ("", ".common", ".jax", ".jax.array_typing", ".jax.modules", ".jax.scan")
    missing = {f"recurrentgemma._src{name}": importlib.import_module(f"recurrentgemma{name}") for name in inside}
    missing |= {name: ModuleType(name) for name in ("gemma", "gemma.modules")}
    added = {name: module for name, module in missing.items() if name not in sys.modules}
    sys.modules.update(added)
    try:
        return tuple(importlib.import_module(f"tapnet.models.{name}") for name in ("ssm_vit", "video_ssm_tracker"))
    finally:
        for name in added:
            del sys.modules[name]


def tapnext_tracker(weights: str | Path) -> Tracker:
    """TAPNext (arXiv 2504.05579), run frame by frame with the `tapnet` package.

    Args:
      weights: the published `tapnext_ckpt.npz` or `bootstapnext_ckpt.npz`.

    Raises:
      UserError: tapnet is not installed, or there is no such file.
    """
    try:
        ssm_vit, video_ssm_tracker = _tapnet()
    except ImportError as error:
        # Without their dependencies, of which one wants an older absl-py than we do.
        packages = "git+https://github.com/google-deepmind/tapnet recurrentgemma chex toolz 'typeguard<3'"
        raise UserError(f"the tracker TAPNext needs tapnet ({error}); pip install --no-deps {packages}") from None
    try:
        with np.load(files.local(weights)) as stored:
            params = traverse_util.unflatten_dict({key: stored[key] for key in stored.files}, sep="/")
    except (OSError, ValueError) as error:
        raise UserError(f"{weights}: no weights of TAPNext (an .npz file): {error}") from None
    backbone = ssm_vit.Model(
        variant="B/8", patch_size=(1, 8, 8), posemb="learn", posemb_full="sincos2d", rep_size=True, lru_width=768
    )
    model = video_ssm_tracker.TAPNextTracker(backbone)

    @jax.jit
    def step(params, frame, **state):
        result = model.apply({"params": params}, frame, method="forward_step", **state)
        return result.tracks, result.visible_logits, result.state

    def track(video: Video, points: Points) -> tuple[Tracks, Visible]:
        side = TAPNEXT_SIDE
        # It counts (t, y, x) from the frame's corner: pixel i is centred at i + 0.5.
        queries = np.insert(points[:, ::-1] * side, 0, 0, axis=1).astype(np.float32)[None, :, None]
        state = {"query_points": jnp.asarray(queries), "query_padding": jnp.ones(queries.shape[:-1])}
        tracks, visible = [], []
        for frame in video:
            frame = to_float(cv2.resize(frame, (side, side), interpolation=cv2.INTER_AREA))
            at, logits, new = step(params, jnp.asarray(frame)[None, None], **state)
            state = {"state": new}
            tracks.append(np.asarray(at[0, :, 0, ::-1]) / side)
            visible.append(np.asarray(logits[0, :, 0, 0]) > 0)
        tracks[0] = points.astype(np.float32)
        return np.stack(tracks, axis=1).astype(np.float32), np.stack(visible, axis=1)

    return track
