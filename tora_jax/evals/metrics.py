"""Computes all metrics of one video. Metrics without their weights are left out, with the reason."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tora_jax.checkpoints import release
from tora_jax.errors import UserError
from tora_jax.evals import clip_sim, fvd, quality, sprite_metrics, track_lk, track_networks, traj_error
from tora_jax.evals.tasks import Task
from tora_jax.io.video import read_video, write_video
from tora_jax.models.i3d import MIN_FRAMES
from tora_jax.models.raft import RAFT

Video = UInt8[np.ndarray, "t h w 3"]


TRACKERS = ("lk", "raft", "tapnext")


class Metrics:
    """The metrics of a config, with their weights loaded.

    Attributes:
      asked: the options that change a figure; a record of other options is made again.
      left_out: metric -> why it is missing.

    Raises:
      UserError: weights that are named are missing or broken, or there is no such tracker.
    """

    def __init__(self, config: Mapping[str, Any]):
        """
        Args:
          config: `tracker` ("lk", "raft" or "tapnext") and `tracker_weights`; `clip` and `i3d`, folders of the
            converter, "" = none; `size`, (width, height) in whose pixels TrajError counts.
        """
        self.asked = {name: config[name] for name in ("tracker", "tracker_weights", "clip", "i3d", "size")}
        self.size = tuple(config["size"])
        self._track = make_tracker(config["tracker"], config["tracker_weights"])
        self._similarity = clip_sim.load(config["clip"]) if config["clip"] else None
        self._features = fvd.load(config["i3d"]) if config["i3d"] else None
        self.left_out = {}
        for name, kind, variant in (("CLIPSIM", "clip", "CLIP ViT-B/32"), ("FVD", "i3d", "I3D of Kinetics-400")):
            if not config[kind]:
                self.left_out[name] = f"needs the weights of {variant}: --config.measures.{kind}=FOLDER"

    def __call__(
        self, task: Task, video: Video, first_frame: bool = False, whole: bool = False, fps: float = 24
    ) -> dict[str, Any]:
        """A record of one video, fit for JSON.

        Args:
          video: as it was read from its file.
          first_frame: the video was given the true clip's first frame: is it kept?
          whole: compare with the whole true clip, frame by frame.
          fps: of the video.

        Returns:
          metrics: name -> number; see `report.COLUMNS`.
          tracked: where the points of the paths' starts went.
          features, true_features: of I3D, where they are wanted.
        """
        tracked, visible = self._track(video, task.tracks[:, 0])
        metrics = traj_error.traj_error(task.tracks, tracked, visible, self.size)
        metrics["traj_error"] = metrics.pop("l1")
        if task.colours:
            found = sprite_metrics.path_error(video, task.colours, task.tracks)
            metrics |= {"path_error_percent": 100 * found["error"], "found": found["found"]}
        metrics |= quality.steadiness(video)
        for wanted, name, frames in ((first_frame, "_first", slice(0, 1)), (whole, "", slice(None))):
            if wanted and task.video is not None and video[frames].shape == task.video[frames].shape:
                pair = video[frames], task.video[frames]
                metrics |= {f"psnr{name}": quality.psnr(*pair), f"ssim{name}": quality.ssim(*pair)}
        if self._similarity is not None:
            metrics["clipsim"] = self._similarity(video, task.prompt)
        record: dict[str, Any] = {"tracked": np.round(tracked, 5).tolist()}
        if self._features is not None and task.video is not None and min(len(video), len(task.video)) >= MIN_FRAMES:
            true = _through_a_file(task.video, fps)  # else FVD would count what the encoder does to the video alone
            record |= {"features": self._features(video).tolist(), "true_features": self._features(true).tolist()}
        return {"metrics": {k: v if np.isfinite(v) else None for k, v in metrics.items()}, **record}


def make_tracker(name: str, weights: str | Path = "") -> traj_error.Tracker:
    """A tracker by name.

    Args:
      name: "lk", "raft" or "tapnext".
      weights: of "raft" a folder that `python -m convert_weights raft` wrote, of "tapnext" the published file.

    Raises:
      UserError: there is no such tracker, or its weights are missing or broken.
    """
    if name not in TRACKERS:
        raise UserError(f"tracker {name!r}: there are {', '.join(TRACKERS)}")
    if name == "lk":
        return track_lk.track_lk
    if not weights:
        raise UserError(f"the tracker {name} needs weights; lk does without")
    if name == "tapnext":
        return track_networks.tapnext_tracker(weights)
    return track_networks.raft_tracker(*release.load_model(weights, "raft", RAFT))


def _through_a_file(video: Video, fps: float) -> Video:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "true.mp4"
        write_video(path, video, fps)
        return read_video(path)[0]
