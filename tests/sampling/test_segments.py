"""Videos longer than the model's own, clips as conditions, and videos shared out over devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tora_jax.configs.sampling import Settings

from tora_jax import sharding
from tora_jax.backbones import assembly
from tora_jax.conditioning import motion_maps, trajectory
from tora_jax.conditioning.images import Given
from tora_jax.errors import UserError
from tora_jax.sampling import segments
from tora_jax.sampling.generate import generate_batch
from tora_jax.sampling.inputs import Inputs

SIZE = {"height": 32, "width": 32, "steps": 1, "guidance": 1.0}

INPUTS = Inputs("a red star.")


def pieces(models, inputs=INPUTS, progress=None, **changes):
    settings = Settings(**{"num_frames": 12, "segment": 9, **SIZE, **changes})
    made = segments.generate_pieces(models, [inputs], settings, seeds=[0], progress=progress)
    return [piece for (piece,) in made]


def generate(models, images=None, seed=0, **changes):
    (made,) = generate_batch(models, [Inputs("a.", images=images or {})], Settings(**{**SIZE, **changes}), seeds=[seed])
    return made


def clip(seed, frames):
    return np.random.default_rng(seed).integers(0, 256, (frames, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("num_frames", "segment", "overlap", "starts", "latents", "shared", "aligned"),
    [
        (17, 17, 0, [0], 0, 0, True),
        (136, 17, 0, list(range(0, 132, 12)), 2, 5, False),  # the small model
        (204, 204, 0, [0], 0, 0, True),
        (205, 204, 0, [0, 187], 5, 17, True),  # Open-Sora's micro-frames
        (100, 51, 0, [0, 34, 68], 5, 17, True),
        (100, 51, 10, [0, 17, 34, 51], 10, 34, True),
        (60, 51, 2, [0, 46], 2, 5, False),
        (6, 5, 0, [0, 4], 1, 1, False),
    ],
)
def test_segments(tiny_models, num_frames, segment, overlap, starts, latents, shared, aligned):
    plan = segments.plan(tiny_models, num_frames, segment, overlap)
    assert plan == (plan.starts, min(segment, num_frames), latents, shared, aligned)
    assert list(plan.starts) == starts
    last = starts[-1] + plan.length
    assert num_frames <= last < num_frames + plan.length - shared


@pytest.mark.parametrize(("segment", "overlap"), [(0, 0), (1, 0), (5, 2), (17, 5), (17, -1)])
def test_segments_that_bring_nothing(tiny_models, segment, overlap):
    with pytest.raises(UserError, match=r"nothing|at least"):
        segments.plan(tiny_models, 100, segment, overlap)


def test_a_video_of_one_segment_is_generate(tiny_models):
    (piece,) = pieces(tiny_models, num_frames=5)
    (whole,) = generate_batch(tiny_models, [Inputs("a red star.")], Settings(num_frames=5, **SIZE), seeds=[0])
    np.testing.assert_array_equal(piece.video, whole.video)


def test_segments_make_one_video(tiny_models, monkeypatch):
    """Each segment is told the end of the one before, its part of the tracks, its prompt, and a seed of its own."""
    calls, done = [], []

    def spy(models, inputs, settings, *, seeds, **options):
        results = generate_batch(models, inputs, settings, seeds=seeds, **options)
        calls.append((*inputs, *seeds, *results))
        return results

    monkeypatch.setattr(segments, "generate_batch", spy)
    points = [np.array([[0.1, 0.1, 0.0], [0.1, 0.1, 0.5], [0.9, 0.9, 1.0]])]  # a pause, then fast
    tracks = trajectory.tracks(points, 12)
    end = clip(1, 1)[0]
    given = Inputs(["a star.", "a heart."], tracks, {11: end})
    made = pieces(tiny_models, given, progress=lambda step, clean: done.append(step))

    assert [len(piece.video) for piece in made] == [9, 3]
    assert [len(piece.motion) for piece in made] == [9, 3]
    assert done == [1, 2]
    (first, first_seed, begun), (second, second_seed, _) = calls
    assert [first.prompt, second.prompt] == ["a star.", "a heart."]
    assert first_seed != second_seed
    np.testing.assert_array_equal(first.tracks, tracks[:, :9])
    np.testing.assert_array_equal(second.tracks[:, :8], tracks[:, 4:])
    np.testing.assert_array_equal(second.tracks[:, 8], tracks[:, -1])  # what is cut off rests at the end
    assert first.images == {}
    np.testing.assert_array_equal(second.images[0].pixels, begun.video[-5:])
    np.testing.assert_array_equal(second.images[7].pixels, end)
    # One displacement has full colour in both, though the first segment is slower.
    largest = motion_maps.largest_norm(motion_maps.displacement_maps(tracks, 32, 32))
    assert first.max_norm == second.max_norm == pytest.approx(largest)


def test_whole_micro_frames_are_taken_over_as_latents(tiny_models):
    first, second = pieces(tiny_models, num_frames=51, segment=34)
    assert (len(first.video), len(second.video)) == (34, 17)
    np.testing.assert_array_equal(second.latents[:5], first.latents[-5:])


def test_a_clip_sets_the_latents_that_it_fills(tiny_models):
    """Seven frames fill the first two latents of a micro-frame, and begin a third, which is left to the model."""
    pixels = clip(0, 7)
    a, b = (generate(tiny_models, {0: pixels}, seed, num_frames=9) for seed in (0, 1))
    np.testing.assert_array_equal(a.latents[:2], b.latents[:2])
    assert (a.latents[2] != b.latents[2]).any()
    around = pixels[[0, 1, 2, 3, 4, 5, 6, 6, 6]]
    video = jnp.asarray(around, jnp.float32)[None] / 127.5 - 1
    want = tiny_models.vae.apply({"params": tiny_models.params["vae"]}, video, method="encode")
    np.testing.assert_allclose(a.latents[:2], want[0, :2], atol=1e-5)


@pytest.mark.parametrize(("start", "count", "kept"), [(0, 18, {0, 1, 2, 3, 4}), (11, 9, {4, 5}), (2, 2, {1})])
def test_clips_across_micro_frames(tiny_models, start, count, kept):
    num_frames = 20
    given = {start: clip(0, count)}
    a, b = (generate(tiny_models, given, seed, num_frames=num_frames) for seed in (0, 1))
    assert {i for i in range(6) if (a.latents[i] == b.latents[i]).all()} == kept


def test_an_edit_ratio_lets_a_picture_change(tiny_models):
    picture = clip(0, 1)[0]
    made = {}
    for edit in (0.0, 0.5, 1.0):
        images = {0: Given(picture, edit)}
        made[edit] = generate(tiny_models, images, num_frames=5, steps=4)
    plain = generate(tiny_models, num_frames=5, steps=4)
    kept, half, free = (made[edit].latents[0] for edit in (0.0, 0.5, 1.0))
    assert np.abs(half - kept).max() > 1e-3
    assert np.abs(half - free).max() > 1e-3
    # At 1 it is mixed with noise at the first step, of which nothing of it is left.
    assert np.abs(free - kept).max() > np.abs(half - kept).max() > 0
    assert plain.latents.shape == made[1.0].latents.shape


@pytest.mark.parametrize("given", [{3: clip(0, 3)}, {0: clip(0, 6)}, {-1: clip(0, 1)[0]}])
def test_a_clip_that_does_not_fit(tiny_models, given):
    with pytest.raises(UserError, match="frames 0 to 4"):
        generate(tiny_models, given, num_frames=5)


def test_videos_shared_out_over_devices(tiny_models, tiny_config):
    """Eight devices, one video each, and the same pixels as on one, but for rounding."""
    count = 8
    assert len(jax.devices()) == count
    tracks = [trajectory.tracks([np.array([[0.1, 0.1 * i], [0.9, 0.5]])], 5) for i in range(count)]
    inputs = [Inputs("a star.", tracks[i], {0: clip(i, 1)[0]}) for i in range(count)]
    mesh = sharding.make_mesh("data=4,fsdp=2")
    rules = (("embed", "fsdp"), ("hidden", "tensor"))
    placed = assembly.load(tiny_config, place=functools.partial(sharding.param_shardings, mesh=mesh, rules=rules))
    settings = Settings(**{**SIZE, "num_frames": 5, "guidance": 3.0})
    shared = generate_batch(placed, inputs, settings, seeds=range(count), mesh=mesh)
    alone = generate_batch(tiny_models, inputs, settings, seeds=range(count))
    for one, other in zip(shared, alone, strict=True):
        assert np.abs(one.video.astype(int) - other.video).max() <= 1
    leaves = jax.tree.leaves(placed.params["tora"])
    assert all(leaf.sharding.num_devices == count for leaf in leaves)
    assert dataclasses.asdict(shared[0])["seconds"].keys() >= {"sample", "decode"}
