"""Curation: camera and objects against truth, and the flow that they are found from."""

import collections
import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.flax import save_file

from tests import moving
from tora_jax.data.curate import camera
from tora_jax.errors import UserError
from tora_jax.io.video import read_video, write_video
from tora_jax.models.raft import RAFT

DIS = camera.make_flow("dis")
SECONDS = 1 / moving.FPS
STATIC = 0.04
FOREGROUND = 0.005


def judge(video):
    return camera.analyse(video, DIS(video), SECONDS, STATIC)


def kept(found):
    """As the rules have it: objects are needed, whatever the camera does."""
    return found.foreground >= FOREGROUND


def overlap(masks, truth):
    return (masks & truth).sum() / (masks | truth).sum()


# ---------------------------------------------------------------- camera and objects


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 23), marks=pytest.mark.slow)])
def test_camera_and_objects_are_told_apart(seeds, tmp_path):
    """Clips of ten kinds, half of them through H.264: at least 95 % right, the masks at least 0.7 alike."""
    wrong, overlaps = [], collections.defaultdict(list)
    for kind in moving.KINDS:
        for seed in seeds:
            clip = moving.make(kind, seed)
            video = clip.video
            if seed % 2:
                write_video(tmp_path / "a.mp4", video, moving.FPS)
                video, _ = read_video(tmp_path / "a.mp4")
            found = judge(video)
            if (found.camera, kept(found)) != (clip.camera, clip.has_object):
                wrong.append((kind, seed, found.camera, found.foreground))
            if clip.has_object:
                overlaps[kind].append(overlap(found.masks, clip.masks[:-1]))
    assert len(wrong) <= 0.05 * len(seeds) * len(moving.KINDS), wrong
    for kind, values in overlaps.items():
        assert np.mean(values) >= 0.8, kind
        assert min(values) >= 0.7, kind


def test_sizes_of_motions():
    """A pan of 20 % of the shorter side a second to the right, and a zoom in of 30 % a second."""
    side, count = 192, 17
    scenery = moving.scenery(np.random.default_rng(0), 2 * side, 3 * side)
    left = 100 + 0.2 * side * SECONDS * np.arange(count)
    pan = np.stack([scenery[50 : 50 + side, round(x) : round(x) + 256] for x in left]).astype(np.uint8)
    found = judge(pan)
    assert found.camera == "pan right"
    assert found.pan == pytest.approx(0.2, rel=0.03)
    assert (found.tilt, found.zoom, found.roll, found.shake) == pytest.approx((0, 0, 0, 0), abs=0.004)
    tilted = judge(pan.swapaxes(1, 2))
    assert (tilted.camera, tilted.tilt) == ("tilt down", pytest.approx(-0.2, rel=0.03))
    growth = np.log(1.3)
    zoom = []
    for j in range(count):
        half = np.exp(-growth * SECONDS * j) * side / 2
        x = (np.arange(side) + 0.5 - side / 2) / (side / 2) * half + side
        at = [a.astype(np.float32) for a in np.meshgrid(x, x)]
        zoom.append(cv2.remap(scenery, *at, cv2.INTER_CUBIC))
    found = judge(np.clip(zoom, 0, 255).astype(np.uint8))
    assert found.camera == "zoom in"
    assert found.zoom == pytest.approx(growth, rel=0.03)
    assert judge(np.clip(zoom[::-1], 0, 255).astype(np.uint8)).camera == "zoom out"


def test_small_pans_are_static():
    side = 192
    scenery = moving.scenery(np.random.default_rng(0), side, 2 * side)
    pan = np.stack([scenery[:, j // 2 : j // 2 + 256] for j in range(17)]).astype(np.uint8)  # 0.02 a second
    found = judge(pan)
    assert found.pan == pytest.approx(8 / side / 2, rel=0.1)
    assert (found.camera, found.foreground) == ("static", 0)


def test_there_and_back_is_no_pan():
    """A camera that returns goes a way without getting anywhere."""
    side = 192
    scenery = moving.scenery(np.random.default_rng(0), side, 2 * side)
    places = [4 * (j % 4 if j % 4 < 3 else 1) for j in range(17)]
    found = judge(np.stack([scenery[:, x : x + 256] for x in places]).astype(np.uint8))
    assert found.camera == "shake"
    assert found.shake == pytest.approx(8 * 4 / side, rel=0.1)


def test_what_fills_the_picture_for_a_moment_is_not_the_camera():
    clip = moving.make("still", 0)
    video = clip.video.copy()
    rng = np.random.default_rng(1)
    video[7:9] = moving.scenery(rng, 192, 256)[None] + rng.normal(0, 1, (2, 192, 256, 3))
    assert judge(video).camera == "static"


@pytest.mark.parametrize("count", [1, 2])
def test_very_short_clips(count):
    found = judge(moving.make("still", 0).video[:count])
    assert (found.camera, found.foreground, len(found.masks)) == ("static", 0, count - 1)


def test_flow_score():
    flow = np.zeros((3, 160, 200, 2), np.float32)
    flow[..., 0], flow[..., 1] = 3, 4
    # 5 pixels in 1/8 s at 160 are 10 at 320, and 10 frames at 24 a second are 3.33 times as long.
    assert camera.flow_score(flow, 1 / 8) == pytest.approx(10 * 8 * 10 / 24)
    assert camera.flow_score(flow[:, ::2, ::2] / 2, 1 / 8) == pytest.approx(10 * 8 * 10 / 24)
    assert camera.flow_score(flow[:0], 1 / 8) == 0


# ---------------------------------------------------------------- flow


def raft():
    """RAFT as small as it gets, and parameters drawn at random."""
    fields = {
        "feature_layers": (4, 4, 4, 4, 8),
        "context_layers": (4, 4, 4, 4, 16),
        "corr_levels": 2,
        "corr_radius": 2,
        "motion_corr_layers": (8, 8),
        "motion_flow_layers": (8, 4),
        "motion_features": 8,
        "hidden": 8,
        "flow_hidden": 8,
        "mask_hidden": 8,
    }
    frame = jnp.zeros((1, 16, 16, 3))
    return fields, jax.jit(RAFT(**fields).init)(jax.random.key(0), frame, frame)["params"]


def test_raft_behind_the_same_function():
    """Any number of frames, any size: padded to whole cells, cut again, in batches of one shape."""
    fields, params = raft()
    video = np.random.default_rng(0).integers(0, 256, (camera.PAIRS + 3, 21, 37, 3), dtype=np.uint8)
    got = camera.raft_flow(RAFT(**fields), params)(video)
    assert got.shape == DIS(video).shape == (camera.PAIRS + 2, 21, 37, 2)
    frames = np.pad(video, ((0, 0), (0, 3), (0, 3), (0, 0)), mode="edge").astype(np.float32) / 127.5 - 1
    want = jax.jit(RAFT(**fields).apply)({"params": params}, jnp.asarray(frames[:-1]), jnp.asarray(frames[1:]))
    np.testing.assert_allclose(got, want[:, :21, :37], atol=1e-4)
    assert camera.raft_flow(RAFT(**fields), params)(video[:1]).shape == (0, 21, 37, 2)


def test_raft_from_a_folder(tmp_path):
    fields, params = raft()
    save_file(traverse_util.flatten_dict(params, sep="/"), tmp_path / "raft.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"raft": fields}))
    video = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    want = camera.raft_flow(RAFT(**fields), params)(video)
    np.testing.assert_array_equal(camera.make_flow("raft", tmp_path)(video), want)


def test_no_such_flow(tmp_path):
    with pytest.raises(UserError, match="flow method 'farneback'; choose one of dis, raft"):
        camera.make_flow("farneback")
    with pytest.raises(UserError, match="'raft' needs weights"):
        camera.make_flow("raft")
    with pytest.raises(UserError, match="no such folder"):
        camera.make_flow("raft", tmp_path / "none")
