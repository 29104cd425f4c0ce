"""Videos longer than the model's own, clips as conditions, and videos shared out over devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tora_jax import sharding
from tora_jax.conditioning import motion_maps, trajectory
from tora_jax.conditioning.images import Given
from tora_jax.errors import UserError
from tora_jax.sampling import generate as generation

SIZE = {"height": 32, "width": 32, "steps": 1, "guidance": 1.0}


def pieces(models, **changes):
    given = {"prompts": ["a red star."], "seeds": [0], "num_frames": 12, "segment": 9, **SIZE, **changes}
    return [piece for (piece,) in generation.generate_pieces(models, **given)]


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
    plan = generation.segments(tiny_models, num_frames, segment, overlap)
    assert plan == (plan.starts, min(segment, num_frames), latents, shared, aligned)
    assert list(plan.starts) == starts
    last = starts[-1] + plan.length
    assert num_frames <= last < num_frames + plan.length - shared


@pytest.mark.parametrize(("segment", "overlap"), [(0, 0), (1, 0), (5, 2), (17, 5), (17, -1)])
def test_segments_that_bring_nothing(tiny_models, segment, overlap):
    with pytest.raises(UserError, match=r"nothing|at least"):
        generation.segments(tiny_models, 100, segment, overlap)


def test_a_video_of_one_segment_is_generate(tiny_models):
    (piece,) = pieces(tiny_models, num_frames=5)
    whole = generation.generate(tiny_models, "a red star.", seed=0, num_frames=5, **SIZE)
    np.testing.assert_array_equal(piece.video, whole.video)


def test_segments_make_one_video(tiny_models, monkeypatch):
    """Each segment is told the end of the one before, its part of the tracks, its prompt, and a seed of its own."""
    calls, done = [], []
    real = generation.generate_batch

    def spy(models, prompts, tracks, images, **settings):
        results = real(models, prompts, tracks, images, **settings)
        calls.append({"prompts": prompts, "tracks": tracks, "images": images, "results": results, **settings})
        return results

    monkeypatch.setattr(generation, "generate_batch", spy)
    points = [np.array([[0.1, 0.1, 0.0], [0.1, 0.1, 0.5], [0.9, 0.9, 1.0]])]  # a pause, then fast
    tracks = trajectory.tracks(points, 12)
    end = clip(1, 1)[0]
    given = {"tracks": [tracks], "images": [{11: end}], "prompts": [["a star.", "a heart."]]}
    made = pieces(tiny_models, **given, progress=done.append)

    assert [len(piece.video) for piece in made] == [9, 3]
    assert [len(piece.motion) for piece in made] == [9, 3]
    assert done == [1, 2]
    first, second = calls
    assert [first["prompts"], second["prompts"]] == [["a star."], ["a heart."]]
    assert first["seeds"] != second["seeds"]
    np.testing.assert_array_equal(first["tracks"][0], tracks[:, :9])
    np.testing.assert_array_equal(second["tracks"][0][:, :8], tracks[:, 4:])
    np.testing.assert_array_equal(second["tracks"][0][:, 8], tracks[:, -1])  # what is cut off rests at the end
    assert first["images"] == [{}]
    np.testing.assert_array_equal(second["images"][0][0].pixels, first["results"][0].video[-5:])
    np.testing.assert_array_equal(second["images"][0][7].pixels, end)
    # One displacement has full colour in both, though the first segment is slower.
    largest = motion_maps.largest_norm(motion_maps.displacement_maps(tracks, 32, 32))
    assert first["max_norms"] == second["max_norms"] == [pytest.approx(largest)]


def test_whole_micro_frames_are_taken_over_as_latents(tiny_models):
    first, second = pieces(tiny_models, num_frames=51, segment=34)
    assert (len(first.video), len(second.video)) == (34, 17)
    np.testing.assert_array_equal(second.latents[:5], first.latents[-5:])


def test_a_clip_sets_the_latents_that_it_fills(tiny_models):
    """Seven frames fill the first two latents of a micro-frame, and begin a third, which is left to the model."""
    pixels = clip(0, 7)
    a, b = (
        generation.generate(tiny_models, "a.", images={0: pixels}, seed=seed, num_frames=9, **SIZE) for seed in (0, 1)
    )
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
    a, b = (generation.generate(tiny_models, "a.", images=given, seed=s, num_frames=num_frames, **SIZE) for s in (0, 1))
    assert {i for i in range(6) if (a.latents[i] == b.latents[i]).all()} == kept


def test_an_edit_ratio_lets_a_picture_change(tiny_models):
    picture = clip(0, 1)[0]
    made = {}
    for edit in (0.0, 0.5, 1.0):
        images = {0: Given(picture, edit)}
        made[edit] = generation.generate(tiny_models, "a.", images=images, num_frames=5, **{**SIZE, "steps": 4})
    plain = generation.generate(tiny_models, "a.", num_frames=5, **{**SIZE, "steps": 4})
    kept, half, free = (made[edit].latents[0] for edit in (0.0, 0.5, 1.0))
    assert np.abs(half - kept).max() > 1e-3
    assert np.abs(half - free).max() > 1e-3
    # At 1 it is mixed with noise at the first step, of which nothing of it is left.
    assert np.abs(free - kept).max() > np.abs(half - kept).max() > 0
    assert plain.latents.shape == made[1.0].latents.shape


@pytest.mark.parametrize("given", [{3: clip(0, 3)}, {0: clip(0, 6)}, {-1: clip(0, 1)[0]}])
def test_a_clip_that_does_not_fit(tiny_models, given):
    with pytest.raises(UserError, match="frames 0 to 4"):
        generation.generate(tiny_models, "a.", images=given, num_frames=5, **SIZE)


def test_videos_shared_out_over_devices(tiny_models):
    """Eight devices, one video each, and the same pixels as on one, but for rounding."""
    count = 8
    assert len(jax.devices()) == count
    tracks = [trajectory.tracks([np.array([[0.1, 0.1 * i], [0.9, 0.5]])], 5) for i in range(count)]
    images = [{0: clip(i, 1)[0]} for i in range(count)]
    given = {"prompts": ["a star."] * count, "seeds": range(count), "tracks": tracks, "images": images, "num_frames": 5}
    mesh = sharding.make_mesh("data=4,fsdp=2")
    placed = generation.place(tiny_models, mesh, (("embed", "fsdp"), ("hidden", "tensor")))
    settings = {**SIZE, "guidance": 3.0}
    shared = generation.generate_batch(placed, **given, **settings, mesh=mesh)
    alone = generation.generate_batch(tiny_models, **given, **settings)
    for one, other in zip(shared, alone, strict=True):
        assert np.abs(one.video.astype(int) - other.video).max() <= 1
    leaves = jax.tree.leaves(placed.params["tora"])
    assert all(leaf.sharding.num_devices == count for leaf in leaves)
    assert dataclasses.asdict(shared[0])["seconds"].keys() >= {"sample", "decode"}
