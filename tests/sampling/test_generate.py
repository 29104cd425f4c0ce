"""The chain from prompt, tracks and images to pixels, on tiny random models."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tora_jax.configs.sampling import Settings

from tora_jax.backbones import assembly
from tora_jax.checkpoints import release
from tora_jax.conditioning import text, trajectory
from tora_jax.diffusion import sampler
from tora_jax.diffusion.rectified_flow import RectifiedFlow
from tora_jax.errors import UserError
from tora_jax.models.tora import Tora
from tora_jax.sampling.generate import generate_batch, video_size
from tora_jax.sampling.inputs import Inputs

SIZE = {"height": 32, "width": 48, "num_frames": 5, "steps": 2}


@pytest.fixture(scope="module")
def tracks():
    return trajectory.tracks([np.array([[0.1, 0.2], [0.9, 0.8]])], SIZE["num_frames"])


@pytest.fixture(scope="module")
def trained(tiny_models):
    """The same models with random numbers in the fusers, which start at zero.

    Equal ones would do next to nothing: the norm after the fuser takes out what all channels have in common.
    """
    rng = np.random.default_rng(0)

    def shake(path, leaf):
        fuser = any("fuser" in str(key) for key in path)
        return leaf + rng.standard_normal(leaf.shape, np.float32) if fuser else leaf

    params = dict(tiny_models.params)
    params["tora"] = jax.tree_util.tree_map_with_path(shake, params["tora"])
    return dataclasses.replace(tiny_models, params=params)


def run(models, seed=0, progress=None, **changes):
    """One video; changes are of its inputs and settings."""
    given = {name: changes.pop(name) for name in Inputs._fields if name in changes}
    inputs, settings = Inputs(**{"prompt": "a red star.", **given}), Settings(**{**SIZE, **changes})
    return generate_batch(models, [inputs], settings, seeds=[seed], progress=progress)[0]


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (SIZE["height"], SIZE["width"], 3), np.uint8)


def test_result(tiny_models, tracks):
    done = []
    result = run(tiny_models, tracks=tracks, progress=lambda step, clean: done.append(step))
    assert result.video.shape == result.motion.shape == (5, 32, 48, 3)
    assert result.video.dtype == np.uint8
    assert result.video.std() > 0
    assert done == [1, 2]
    assert (result.motion[0] == 255).all()
    assert (result.motion[1:] < 255).any()
    assert set(result.seconds) == {"text", "motion", "sample", "decode"}
    assert all(s["run"] >= 0 and s["compile"] >= 0 for s in result.seconds.values())


def test_the_seed_decides(tiny_models, tracks):
    first, again, other = (run(tiny_models, tracks=tracks, seed=s).video for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_batch_is_its_clips_one_by_one(trained, tracks):
    """With prompts, seeds and tracks of their own, and an image for one of them; differences are of rounding."""
    prompts, seeds, images = ["a red star.", "two green waves.", "a blue disc."], [1, 2, 3], [{}, {0: picture(0)}, {}]
    paths = [tracks, np.concatenate([tracks, tracks[..., ::-1]]), tracks[:, ::-1]]
    settings = {**SIZE, "guidance": 3.0, "trajectory_guidance": 2.0}
    batch = generate_batch(trained, list(map(Inputs, prompts, paths, images)), Settings(**settings), seeds=seeds)
    for i, result in enumerate(batch):
        alone = run(trained, prompt=prompts[i], tracks=paths[i], images=images[i], seed=seeds[i], **settings)
        np.testing.assert_array_equal(result.motion, alone.motion)
        assert np.abs(result.video.astype(int) - alone.video).max() <= 1
        assert np.abs(result.video.astype(int) - batch[i - 1].video).max() > 1


@pytest.mark.parametrize(("inputs", "seeds"), [([Inputs("a"), Inputs("b")], [0]), ([], [])])
def test_a_batch_with_something_missing(tiny_models, inputs, seeds):
    with pytest.raises(UserError, match="one for each video"):
        generate_batch(tiny_models, inputs, Settings(**SIZE), seeds=seeds)


def test_a_batch_of_which_some_have_tracks(tiny_models, tracks):
    with pytest.raises(UserError, match="some have none"):
        generate_batch(tiny_models, [Inputs("a", tracks), Inputs("b")], Settings(**SIZE), seeds=[0, 1])


def test_trajectory_reaches_the_video(tiny_models, trained, tracks):
    """Not through an untrained fuser, but through a trained one; and so does its guidance."""
    np.testing.assert_array_equal(run(tiny_models, tracks=tracks).video, run(tiny_models).video)
    np.testing.assert_array_equal(run(trained).video, run(tiny_models).video)
    moved = run(trained, tracks=tracks).video
    assert (moved != run(trained).video).any()
    assert (moved != run(trained, tracks=tracks[:, ::-1]).video).any()
    assert (moved != run(trained, tracks=tracks, trajectory_guidance=3.0).video).any()


def test_prompts_reach_the_video(tiny_models):
    plain = run(tiny_models).video
    assert (plain != run(tiny_models, prompt="green waves.").video).any()
    assert (plain != run(tiny_models, negative_prompt="green waves.").video).any()
    assert (plain != run(tiny_models, guidance=1.0).video).any()


@pytest.mark.parametrize("num_frames", [1, 2, 5, 17, 18])
def test_given_images_fill_their_latents(tiny_models, num_frames):
    """With an image for every latent nothing is left to chance: the video is their reconstruction."""
    vae, params = tiny_models.vae, tiny_models.params["vae"]
    frames = {vae.latent_of(j, num_frames): j for j in range(num_frames)}  # the last frame of each latent
    images = {frame: picture(frame) for frame in frames.values()}
    videos = [run(tiny_models, images=images, num_frames=num_frames, seed=s).video for s in (0, 1)]
    np.testing.assert_array_equal(*videos)

    latents = []
    for latent, frame in sorted(frames.items()):
        start = frame - frame % 17
        length = min(17, num_frames - start)
        # A frame that has a latent for itself is encoded alone, any other in a still clip.
        alone = vae.latent_of(start, num_frames) == latent and length % 4 == 1
        clip = np.stack([images[frame]] * (1 if alone else length))[None]
        encoded = np.asarray(tiny_models.encode_video(params, np.asarray(clip, np.float32) / 127.5 - 1))
        latents.append(encoded[:, latent - vae.latent_of(start, num_frames)])
    (want,), _ = tiny_models.decode(num_frames, params, np.stack(latents, 1))
    assert np.abs(videos[0].astype(int) - np.asarray(want)).max() <= 1


def test_sizes_are_cut_to_whole_cells(tiny_models, tracks):
    images = {0: np.zeros((*video_size(tiny_models, 37, 44), 3), np.uint8)}
    result = run(tiny_models, tracks=tracks, images=images, height=37, width=44)
    assert result.video.shape == result.motion.shape == (5, 32, 40, 3)


def test_an_exception_from_progress_stops(tiny_models):
    done = []

    def stop(step, clean):
        done.append(step)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_models, progress=stop)
    assert done == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 0}, "num_frames is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"height": 8}, "too small"),
        ({"width": 0}, "width is 0"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"trajectory_guidance": float("inf")}, "trajectory_guidance is inf"),
        ({"steps": 10**9}, "million"),
        ({"fps": 0.0}, "fps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"tracks": np.zeros((1, 4, 2), np.float32)}, "one point a frame"),
        ({"images": {5: picture(0)}}, "frame 5"),
        ({"images": {0: picture(0)[:-1]}}, "size"),
    ],
)
def test_wrong_values(tiny_models, changes, message):
    with pytest.raises(UserError, match=message):
        run(tiny_models, **changes)


class TestRelease:
    def test_round_trip(self, tiny_release, tiny_models, tracks):
        models = assembly.load(weights=tiny_release)
        assert models.origin == str(tiny_release)
        assert {p.name for p in tiny_release.parent.iterdir()} == {"tiny"}
        np.testing.assert_array_equal(run(models, tracks=tracks).video, run(tiny_models, tracks=tracks).video)

    def test_never_overwrites(self, tiny_release, tiny_models, tiny_config):
        with pytest.raises(UserError, match="exists already"):
            release.save(tiny_release, tiny_config, tiny_models.params, tiny_release / "tokenizer.model", "")

    def test_weights_of_another_size(self, tiny_release, tiny_config):
        stdit = {**tiny_config["tora"]["stdit"], "variant": "1x32x2/2"}
        other = {**tiny_config, "tora": {**tiny_config["tora"], "stdit": stdit}}
        with pytest.raises(UserError, match="another size"):
            assembly.load(other, tiny_release)

    @pytest.mark.parametrize(
        "name", ["config.json", "tora.safetensors", "vae.safetensors", "t5.safetensors", "tokenizer.model"]
    )
    @pytest.mark.parametrize("fault", ["missing", "truncated", "empty"])
    def test_broken_folder(self, tiny_release, tmp_path, name, fault):
        broken = tmp_path / "broken"
        broken.mkdir()
        for path in tiny_release.iterdir():
            (broken / path.name).write_bytes(path.read_bytes())
        content = (broken / name).read_bytes()
        if fault == "missing":
            (broken / name).unlink()
        else:
            (broken / name).write_bytes(content[: len(content) // 2] if fault == "truncated" else b"")
        with pytest.raises(UserError, match=name) as error:
            assembly.load(weights=broken)
        assert "\n" not in str(error.value)


def changed(config, path, value):
    """A copy of a nested dict with one leaf, "a.b.c", changed; None deletes it."""
    name, _, rest = path.partition(".")
    if rest:
        return {**config, name: changed(config[name], rest, value)}
    return {**{k: v for k, v in config.items() if k != name}, **({} if value is None else {name: value})}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("t5", None, "no section t5"),
        ("t5", 3, "t5 should hold"),
        ("tora.fuzer", "x", "did you mean fuser"),
        ("tora.stdit.varient", "XL/2", "did you mean variant"),
        ("tora.stdit.fuser", "x", "no field 'fuser'"),
        ("vae.spatial.chanels", (4, 4), "did you mean channels"),
        ("vae.spatial", None, "spatial"),
        ("tora.fuser", "sideways", "unknown fuser 'sideways'"),
        ("tora.placement", "above", "unknown placement 'above'"),
        ("tora.stdit.variant", "XXL", "unknown variant 'XXL'"),
        ("tora.stdit.variant", "7x3x2/2", "multiple"),
        ("tora.stdit.remat", "sometimes", "sometimes"),
        ("tora.stdit.dtype", "bfloat17", "bfloat17"),
        ("tora.stdit.caption_channels", 16, "make them equal"),
        ("tora.stdit.in_channels", 8, "8"),
        ("tora.data_std", 0.0, "data_std"),
        ("tora.time_scale", 0.0, "time_scale"),
        ("vae.spatial.norm_groups", 3, "config"),
        ("vae.temporal.temporal_downsample", (True,), "temporal_downsample"),
        ("vae.micro_frame_size", 9, "micro_frame_size"),
        ("t5.vocab_size", 100, "1024 pieces"),
        ("t5.dtype", "float16", "float16"),
    ],
)
def test_configs_that_make_no_model(tiny_config, path, value, message):
    with pytest.raises(UserError, match=message) as error:
        assembly.load(changed(tiny_config, path, value))
    assert "\n" not in str(error.value)


def told(models, time_scale=1.0, **changes):
    """What the denoiser is told at each step; one that predicts ones stands in for it."""
    calls = []

    class Recorder(Tora):
        def apply(self, variables, x, timestep=None, text=None, *, method, mutable=(), **conditions):
            if method == "extract":
                return x[None]  # for one pair of blocks
            calls.append({"x": np.asarray(x), "timestep": np.asarray(timestep), "text": text, **conditions})
            return jnp.ones_like(x), {}  # it sows nothing

    with mock.patch.object(sampler, "step", sampler.step.__wrapped__):  # not compiled, so that it sees numbers
        recorder = Recorder({"variant": "1x16x2/2"}, time_scale=time_scale)
        run(dataclasses.replace(models, parts={**models.parts, "tora": recorder}), **changes)
    return calls


def test_the_time_scale_of_the_weights_holds_in_sampling(tiny_models, tracks):
    calls = told(tiny_models, time_scale=5.0, prompt="", tracks=tracks, height=37)
    times = RectifiedFlow(5.0).times(2, 37, 48, 2)
    assert times[2] > 1.5 * RectifiedFlow().times(2, 37, 48, 2)[2]
    for call, time in zip(calls, times[1:-1], strict=True):
        np.testing.assert_allclose(call["timestep"], time)


def test_what_the_denoiser_is_told(tiny_models, tracks):
    prompt = "two green stars"
    calls = told(tiny_models, prompt=prompt, tracks=tracks, trajectory_guidance=2.0, fps=10.0, height=37)
    times = RectifiedFlow().times(2, 37, 48, 2)
    _, mask = tiny_models.tokenizer([text.clean(prompt)])
    assert len(calls) == SIZE["steps"]
    for call, time in zip(calls, times[1:-1], strict=True):
        np.testing.assert_allclose(call["timestep"], [time] * 3)
        np.testing.assert_array_equal(call["drop_text"], [False, True, False])
        np.testing.assert_array_equal(call["has_motion"], [True, True, False])
        np.testing.assert_array_equal(call["text_mask"], np.repeat(mask, 3, 0))  # the null caption keeps the mask
        np.testing.assert_array_equal(call["fps"], [10] * 3)
        np.testing.assert_array_equal(call["height"], [37] * 3)  # as asked for, though the video has 32
        np.testing.assert_array_equal(call["width"], [48] * 3)
        assert call["text"].shape == (3, 12, 8)
        assert call["frame_mask"] is None
        assert call["features"].shape[:2] == (1, 1)  # shared by the passes


def test_what_the_denoiser_is_told_of_a_negative_prompt(tiny_models):
    call, *_ = told(tiny_models, prompt="two green stars", negative_prompt="waves")
    _, mask = tiny_models.tokenizer([text.clean("two green stars"), text.clean("waves")])
    np.testing.assert_array_equal(call["drop_text"], [False, False])
    np.testing.assert_array_equal(call["text_mask"], mask)
    assert (call["text"][0] != call["text"][1]).any()
    assert call["features"] is None
    assert call["has_motion"] is None


def test_what_the_denoiser_is_told_of_a_single_frame(tiny_models):
    call, *_ = told(tiny_models, num_frames=1, guidance=1.0)
    np.testing.assert_array_equal(call["fps"], [120])


def test_a_given_image_stays_while_the_rest_is_made(tiny_models):
    calls = told(tiny_models, images={0: picture(0)})
    alone = jnp.asarray(picture(0), jnp.float32)[None, None] / 127.5 - 1
    latent = tiny_models.vae.apply({"params": tiny_models.params["vae"]}, alone, method="encode")
    for call in calls:
        np.testing.assert_array_equal(call["frame_mask"], [[False, True]] * 2)
        np.testing.assert_allclose(call["x"][:, 0], np.repeat(latent[:, 0], 2, 0), atol=1e-5)
    assert (calls[0]["x"][:, 1] != calls[1]["x"][:, 1]).any()


@pytest.mark.parametrize("part", ["tora", "vae"])
def test_damaged_weights_are_found_out(tiny_models, part):
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), tiny_models.params[part])
    with pytest.raises(UserError, match="not finite"):
        run(dataclasses.replace(tiny_models, params={**tiny_models.params, part: params}))
