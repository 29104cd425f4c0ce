"""The chain from prompt, tracks and images to pixels, on tiny random models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tora_jax import generate, release, trajectory
from tora_jax.errors import UserError
from tora_jax.models.video_vae import latent_of

SIZE = {"height": 32, "width": 48, "num_frames": 5, "steps": 2}


@pytest.fixture(scope="module")
def tracks():
    return trajectory.tracks([np.array([[0.1, 0.2], [0.9, 0.8]])], SIZE["num_frames"])


@pytest.fixture(scope="module")
def trained(tiny_models):
    """The same models with random numbers in the fusers, which start at zero."""

    def shake(path, leaf):
        return leaf + 1.0 if any("fuser" in str(key) for key in path) else leaf

    params = dict(tiny_models.params)
    params["tora"] = jax.tree_util.tree_map_with_path(shake, params["tora"])
    fields = {f: getattr(tiny_models, f) for f in ("tora", "vae", "motion_vae", "t5", "tokenizer", "origin")}
    return generate.Models(**fields, params=params)


def run(models, **changes):
    return generate.generate(models, **{"prompt": "a red star.", **SIZE, **changes})


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (SIZE["height"], SIZE["width"], 3), np.uint8)


def test_result(tiny_models, tracks):
    done = []
    result = run(tiny_models, tracks=tracks, progress=done.append)
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
    vae, params = tiny_models.vae, {"params": tiny_models.params["vae"]}
    frames = {latent_of(j, num_frames): j for j in range(num_frames)}  # the last frame of each latent
    images = {frame: picture(frame) for frame in frames.values()}
    videos = [run(tiny_models, images=images, num_frames=num_frames, seed=s).video for s in (0, 1)]
    np.testing.assert_array_equal(*videos)

    latents = []
    for latent, frame in sorted(frames.items()):
        start = frame - frame % 17
        length = min(17, num_frames - start)
        # A frame that has a latent for itself is encoded alone, any other in a still clip.
        alone = latent_of(start, num_frames) == latent and length % 4 == 1
        clip = np.stack([images[frame]] * (1 if alone else length))[None]
        encoded = vae.apply(params, jnp.asarray(clip, jnp.float32) / 127.5 - 1, method="encode")
        latents.append(encoded[:, latent - latent_of(start, num_frames)])
    want = vae.apply(params, jnp.stack(latents, 1), num_frames, method="decode")
    want = np.asarray(jnp.clip(want[0], -1, 1) * 127.5 + 127.5)
    assert np.abs(videos[0] - want).max() <= 1


def test_sizes_are_cut_to_whole_cells(tiny_models, tracks):
    images = {0: np.zeros((37, 44, 3), np.uint8)}
    result = run(tiny_models, tracks=tracks, images=images, height=37, width=44)
    assert result.video.shape == result.motion.shape == (5, 32, 40, 3)


def test_an_exception_from_progress_stops(tiny_models):
    done = []

    def stop(step):
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
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"trajectory_guidance": float("inf")}, "trajectory_guidance is inf"),
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
        models = generate.load(release.read_config(tiny_release), tiny_release)
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
            generate.load(other, tiny_release)

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
            generate.load(release.read_config(broken), broken)
        assert "\n" not in str(error.value)


def test_unknown_config_field(tiny_config):
    with pytest.raises(UserError, match="fuzer"):
        generate.load({**tiny_config, "tora": {**tiny_config["tora"], "fuzer": "adaptive_norm"}})
    with pytest.raises(UserError, match="t5"):
        generate.load({k: v for k, v in tiny_config.items() if k != "t5"})
