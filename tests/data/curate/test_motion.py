"""Curation: flow, camera and objects against truth, tracks, and what single frames tell."""

import collections
import functools
import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.flax import save_file

pytest.importorskip("scenedetect")

from tests import moving
from tora_jax.data.curate import appearance, camera, tracks
from tora_jax.data.sprites.clips import make_clip
from tora_jax.errors import UserError
from tora_jax.io.video import read_video, write_video
from tora_jax.models.aesthetic import AestheticHead
from tora_jax.models.clip import CLIP, CLIPText, CLIPVision
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


# ---------------------------------------------------------------- tracks


@pytest.mark.parametrize("kind", ["still, object", "pan, object", "zoom, object", "shake, object"])
def test_tracks_stay_on_their_objects(kind):
    errors = []
    for seed in range(3):
        clip = moving.make(kind, seed)
        forward, backward = DIS(clip.video), DIS(clip.video[::-1])[::-1]
        masks = camera.analyse(clip.video, forward, SECONDS, STATIC).masks
        paths, visible = tracks.inside_objects(np.random.default_rng(0), clip.video, forward, backward, masks, 8, 4)
        assert paths.shape == (8, 17, 2)  # four from the first frame, four from the ninth
        assert (visible.argmax(1) == np.repeat([0, 8], 4)).all()
        height, width = clip.video.shape[1:3]
        for path, seen in zip(paths, visible, strict=True):
            at = np.flatnonzero(seen)
            assert (np.diff(at) == 1).all()
            x, y = (path[at[0]] * (width, height)).astype(int)
            assert clip.masks[at[0], y, x]
            want = path[at[0]] + clip.path[at] - clip.path[at[0]]
            errors.append(np.linalg.norm((path[at] - want) * (width, height), axis=1).max())
            np.testing.assert_array_equal(path[: at[0]], np.repeat(path[at[0]][None], at[0], 0))
            np.testing.assert_array_equal(path[at[-1] :], np.repeat(path[at[-1]][None], 17 - at[-1], 0))
    assert np.median(errors) < 2  # pixels, of ways of 37 to 96
    assert np.max(errors) < 10


def test_a_covered_point_is_lost():
    """The disc that moves behind another one is lost there; the one in front is not."""
    video, labels = np.zeros((9, 64, 96, 3), np.uint8), np.zeros((9, 64, 96), int)
    rng = np.random.default_rng(0)
    video[:] = moving.scenery(rng, 64, 96)
    skins = moving.scenery(rng, 32, 32), moving.scenery(rng, 32, 32)
    y, x = np.mgrid[:32, :32] - 15.5
    disc = np.hypot(x, y) < 13
    for j in range(9):
        for i, left in enumerate((4 * j, 60 - 4 * j)):  # they meet at frames 4 and 5
            region = video[j, 16:48, left : left + 32]
            region[disc] = skins[i][disc]
            labels[j, 16:48, left : left + 32][disc] = i + 1
    forward, backward = DIS(video), DIS(video[::-1])[::-1]
    masks = labels[:-1] > 0
    paths, visible = tracks.inside_objects(np.random.default_rng(0), video, forward, backward, masks, 8, 40)
    behind = 0
    for path, seen in zip(paths, visible, strict=True):
        x, y = path[0] * (96, 64)
        if labels[0, int(y), int(x)] == 1:
            covered = [np.hypot(x + 4 * j - 76 + 4 * j, y - 32) < 8 for j in range(9)]  # well inside the other disc
            behind += any(covered)
            assert not seen[np.flatnonzero(covered)].any()
        elif labels[0, int(y), int(x)] == 2:
            assert seen[:8].all()
    assert behind >= 2


def test_nothing_moves_no_tracks():
    flow, masks = np.zeros((4, 32, 32, 2), np.float32), np.zeros((4, 32, 32), bool)
    video = np.zeros((5, 32, 32, 3), np.uint8)
    for mask in (masks, ~masks):
        paths, visible = tracks.inside_objects(np.random.default_rng(0), video, flow, flow, mask, 2, 4)
        assert (paths.shape, visible.shape) == ((0, 5, 2), (0, 5))


def test_to_all_frames():
    paths = np.array([[[0.0, 0.5], [0.4, 0.5], [0.4, 0.5]]], np.float32)
    visible = np.array([[True, True, False]])
    got, seen = tracks.to_all_frames(paths, visible, np.array([0, 2, 6]))
    np.testing.assert_allclose(got[0, :, 0], [0, 0.2, 0.4, 0.4, 0.4, 0.4, 0.4])
    assert seen[0].tolist() == [True, True, True, False, False, False, False]
    same, shown = tracks.to_all_frames(paths, visible, np.arange(3))
    np.testing.assert_array_equal(same, paths)
    np.testing.assert_array_equal(shown, visible)
    one, _ = tracks.to_all_frames(paths[:, :1], visible[:, :1], np.array([0]))
    np.testing.assert_array_equal(one, paths[:, :1])


# ---------------------------------------------------------------- looks


def bits(one, other):
    return int(np.bitwise_count(np.frombuffer(one, np.uint8) ^ np.frombuffer(other, np.uint8)).sum())


def test_copies_hash_alike_and_others_do_not(tmp_path):
    codes = {}
    for index in range(6):
        video = make_clip(index, size=128).video
        codes[index] = appearance.perceptual_hash(video[appearance.spread(len(video))])
        assert len(codes[index]) * 8 == appearance.BITS
        smaller = np.stack([cv2.resize(f, (80, 72), interpolation=cv2.INTER_AREA) for f in video])
        darker = (video * 0.8 + 10).astype(np.uint8)
        for name, changed in (("smaller", smaller), ("darker", darker)):
            write_video(tmp_path / "a.mp4", changed, 8)
            frames, info = appearance.read_frames(tmp_path / "a.mp4", appearance.spread, 256)
            assert (len(frames), info) == (appearance.FRAMES, (len(video), *changed.shape[1:3], 8))
            assert bits(appearance.perceptual_hash(frames), codes[index]) <= 16, name
    for i in codes:
        assert all(bits(codes[i], codes[j]) > 32 for j in codes if i != j)


def test_frames_are_spread():
    assert appearance.spread(8) == [1, 3, 5, 7]
    assert appearance.spread(2) == [0, 0, 1, 1]


def small_clip():
    text = CLIPText(vocab_size=8, max_length=4, width=8, mlp_dim=8, depth=1, num_heads=2)
    vision = CLIPVision(image_size=16, patch=8, width=8, mlp_dim=8, depth=1, num_heads=2)
    return CLIP(text, vision, features=6)


def test_aesthetic_score():
    """The mean over the frames of the head on CLIP's embeddings, with CLIP's own normalisation."""
    model, head = small_clip(), AestheticHead(features=6, layers=((0, 4), (2, 1)))
    inputs = jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 16, 16, 3))
    params = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
    head_params = jax.jit(head.init)(jax.random.key(1), jnp.zeros((1, 6)))["params"]
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    got = appearance.clip_judge(model, params, head, head_params)(frames)
    pixels = (frames / 255 - np.array([0.4815, 0.4578, 0.4082])) / np.array([0.2686, 0.2613, 0.2758])
    encode = jax.jit(functools.partial(model.apply, method=CLIP.encode_image))
    embedded = encode({"params": params}, jnp.asarray(pixels, jnp.float32))
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, rtol=1e-5)
    want = np.asarray(head.apply({"params": head_params}, embedded)).mean()
    assert got == pytest.approx(want, abs=1e-4)
