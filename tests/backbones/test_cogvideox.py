"""The released Tora as a backbone: one request after the other through the public functions, on tiny random weights."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from tora_jax.configs import model_sizes, tora_cogvideox, vae

from tests import records, training_runs
from tora_jax import generate, load
from tora_jax.backbones import assembly, cogvideox, opensora
from tora_jax.checkpoints import release
from tora_jax.data.sprites.dataset import SpritesConfig
from tora_jax.diffusion.v_prediction import VPrediction
from tora_jax.errors import UserError
from tora_jax.sampling import request

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 32, 3), np.uint8)
QUIET = pytest.mark.filterwarnings("ignore:.*the authors' own code has these weights make")


def random_weights(folder, **options):
    """A release folder of tiny weights with random numbers in the fusers, which start at zero."""
    config = model_sizes.tiny_cogvideox(**options)
    models, rng = load(config=config), np.random.default_rng(0)

    def shake(path, leaf):
        fuser = any("fuser" in str(key) for key in path)
        return np.asarray(leaf) + rng.standard_normal(leaf.shape, np.float32) * fuser

    params = jax.tree_util.tree_map_with_path(shake, dict(models.params))
    release.save(folder, assembly.sections(config), params, assembly.tokenizer_path(None), "Random numbers.\n")
    return folder


@pytest.fixture(scope="module")
def t2v(tmp_path_factory):
    return load(random_weights(tmp_path_factory.mktemp("weights") / "t2v"))


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    return load(random_weights(tmp_path_factory.mktemp("weights") / "i2v", i2v=True))


def seen(models, **settings):
    """What the denoiser is told by a request."""
    wanted = request.make(models.sampling, {"trajectories": "arc", **settings})
    inputs = [request.Inputs(each, wanted.tracks) for each in wanted.prompts]
    return models.backbone.conditions(models, inputs, wanted.settings)


@QUIET
def test_trajectories_and_their_strength(t2v):
    """Strength 0 is plain CogVideoX to the bit, 1 is what the weights do; a part of the steps lies between."""
    default = generate(t2v, trajectories="arc")
    assert default.video.shape == default.motion.shape == (9, 32, 32, 3)
    assert t2v.backbone is cogvideox
    plain = generate(t2v, trajectories=None).latents
    np.testing.assert_array_equal(generate(t2v, trajectories="arc", trajectory_strength=0.0).latents, plain)
    whole = generate(t2v, trajectories="arc", trajectory_strength=1.0).latents
    np.testing.assert_allclose(whole, default.latents, atol=1e-4)
    span = {"trajectory_strength": 1.0, "trajectory_from": 0.0, "trajectory_to": 0.5}
    half = generate(t2v, trajectories="arc", **span).latents
    differ = [np.abs(half - other).max() for other in (plain, whole)]
    assert min(*differ, np.abs(plain - whole).max()) > 1e-3


@QUIET
def test_fusion_once_a_video(t2v):
    """Gamma and beta that are kept make the same video."""
    kept = dataclasses.replace(t2v, parts={**t2v.parts, "tora": t2v.tora.clone(keep_fusion=True)})
    each = generate(t2v, trajectories="arc").latents
    np.testing.assert_allclose(generate(kept, trajectories="arc").latents, each, atol=1e-4)


def test_loading_in_eight_bits(t2v):
    """The blocks' kernels alone, on the host or on the device; a pass has the shapes that it has with all bits."""
    for low_memory in (False, True):
        models = load(t2v.origin, low_memory=low_memory, eight_bit=True)
        small, plain = models.params["tora"]["cogvideox"], t2v.params["tora"]["cogvideox"]
        assert small["blocks"]["mlp"]["fc1"]["kernel"].dtype == np.int8
        assert isinstance(small["blocks"]["mlp"]["fc1"]["kernel"], np.ndarray) == low_memory
        assert small["final_layer"]["linear"]["kernel"].dtype == plain["final_layer"]["linear"]["kernel"].dtype
    x, text = np.zeros((1, 3, 4, 4, 16), np.float32), np.zeros((1, t2v.tora.caption_length, 8), np.float32)
    out, _ = jax.eval_shape(models.denoise, models.params["tora"], x, np.float32([500]), text, features=None)
    assert out.shape == x.shape


@QUIET
def test_the_front_ends(t2v):
    """Their null captions, and the timesteps of their samplers."""
    diffusers = dataclasses.replace(t2v, parts={**t2v.parts, "tora": t2v.tora.clone(front_end="diffusers")})
    length = t2v.tora.caption_length
    zeros = seen(t2v)["text"]
    assert zeros.shape == (2, length, 8)
    assert np.abs(zeros[0]).min() > 0  # padding has features, too
    assert not np.asarray(zeros[1]).any()
    np.testing.assert_array_equal(seen(diffusers)["text"][1], seen(diffusers, prompt="")["text"][0])
    negative = seen(diffusers, prompt="blurred")["text"][0]
    for models in (t2v, diffusers):
        np.testing.assert_array_equal(seen(models, negative_prompt="blurred")["text"][1], negative)
    assert len(seen(t2v, guidance=1.0)["text"]) == 1
    assert cogvideox.process(t2v.parts) == VPrediction("sat")
    assert cogvideox.process(diffusers.parts) == VPrediction("trailing")


def test_captions_are_not_cleaned(t2v):
    told = [seen(t2v, prompt=prompt)["text"][0] for prompt in ("A Star", "a star")]
    assert np.abs(told[0] - told[1]).max() > 0


@QUIET
def test_a_given_picture(i2v):
    """The first frame counts, and a long video goes on from the last frame of the segment before."""
    one = generate(i2v, trajectories=None, conditions={0: PICTURE}, num_frames=17)
    other = generate(i2v, trajectories=None, conditions={0: 255 - PICTURE}, num_frames=17)
    assert one.video.shape == (17, 32, 32, 3)
    assert (one.video != other.video).mean() > 0.1
    first = generate(i2v, trajectories=None, conditions={0: PICTURE})
    np.testing.assert_array_equal(first.video, one.video[:9])


REFUSED = {
    "size": ({"height": 40, "width": 32}, "multiples of 16 pixels, such as 32x32"),
    "frames": ({"num_frames": 10, "segment": 10}, "8k \\+ 1, such as 9 or 17"),
    "even": ({"num_frames": 8, "segment": 8}, "8k \\+ 1, such as 1 or 9"),
    "guidance": ({"trajectory_guidance": 2.0}, "no null trajectory"),
    "picture": ({"conditions": {0: PICTURE}}, "take image-to-video ones"),
    "long": ({"num_frames": 17}, "--segment=17"),
    "solver": ({"solver": "euler"}, "choose dpm2m_sde or ddim"),
    "strength": ({"trajectory_strength": 11.0}, "up to 10"),
    "part": ({"trajectory_from": 0.5}, "go with trajectory_strength"),
}
REFUSED_BY_I2V = {
    "no picture": ({}, "give --image"),
    "last": ({"conditions": {0: PICTURE, -1: PICTURE}}, "leave out what is given at 8"),
    "edit": ({"conditions": {0: (PICTURE, 0.5)}}, "no edit"),
    "clip": ({"conditions": {0: np.stack([PICTURE] * 3)}}, "no clip"),
    "overlap": ({"conditions": {0: PICTURE}, "num_frames": 17, "overlap": 2}, "--overlap=1"),
}


@QUIET
@pytest.mark.parametrize("name", REFUSED)
def test_what_text_to_video_weights_refuse(t2v, name):
    settings, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        generate(t2v, trajectories="arc", **settings)


@QUIET
@pytest.mark.parametrize("name", REFUSED_BY_I2V)
def test_what_image_to_video_weights_refuse(i2v, name):
    settings, message = REFUSED_BY_I2V[name]
    with pytest.raises(UserError, match=message):
        generate(i2v, trajectories="arc", **settings)


def test_learned_positions_fit_one_size():
    """Where they are added, as diffusers does."""
    config = model_sizes.tiny_cogvideox(i2v=True, front_end="diffusers")
    tora = assembly.modules(config)["tora"]
    tora.check_grid((3, 2, 2))
    with pytest.raises(UserError, match="learned positions"):
        tora.check_grid((3, 2, 4))


def test_lengths_beyond_the_authors_own(t2v):
    with pytest.warns(UserWarning, match="9 frames: the authors' own code has these weights make 33, 41, 49"):
        generate(t2v, trajectories=None, steps=1)


def test_open_sora_has_no_strength(tiny_models):
    wanted = request.make(tiny_models.sampling, {"trajectory_strength": 0.5})
    with pytest.raises(UserError, match="--trajectory_guidance"):
        opensora.check(tiny_models, [], wanted.settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"front_end": "comfyui"}, "choose sat or diffusers"),
        ({"guidance": "none"}, "choose dynamic or constant"),
        ({"cogvideox": {"in_channels": 24}}, "16 .text to video. or 32 .image to video."),
        ({"cogvideox": {"out_channels": 8}}, "16 latent channels"),
        ({"cogvideox": {"caption_channels": 16}}, "caption_channels is 16"),
    ],
)
def test_parts_that_do_not_fit(change, message):
    config = model_sizes.tiny_cogvideox()
    inner = config["tora"]["cogvideox"] | change.pop("cogvideox", {})
    config["tora"] |= {**change, "cogvideox": inner}
    with pytest.raises(UserError, match=message):
        load(config=config)


def test_configs_of_the_released_sizes():
    """As the facts about the released weights have them; the parts of each fit."""
    for arg in ("", "i2v", "front_end=diffusers", "i2v,front_end=diffusers"):
        config = tora_cogvideox.get_config(arg).to_dict()
        tora = assembly.modules(config)["tora"]
        diffusers, i2v = "diffusers" in arg, "i2v" in arg
        assert (tora.depth, tora.patch, tora.caption_length, tora.given_channels) == (42, 2, 226, 16 * i2v)
        assert config["vae"]["encoder_chunk"] == 8 * diffusers
        assert tora.cogvideox["add_positions"] == (diffusers and i2v)
        sampling = config["sampling"]
        assert (sampling["width"], sampling["height"], sampling["num_frames"]) == (720, 480, 49)
        assert (sampling["steps"], sampling["guidance"], sampling["fps"]) == (50, 6.0, 8.0)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    scale = SpritesConfig(name="least", side=32, frames=9, fps=8.0)
    folder = tmp_path_factory.mktemp("data") / "clips"
    return records.write(folder, {split: records.clips(4, split, scale) for split in ("train", "validation")})


@QUIET
@pytest.mark.parametrize(("arg", "stage"), [("", 1), (",i2v", 2)])
def test_training(clips, tmp_path, t2v, i2v, arg, stage):
    """Extractor and fusers learn, batch norms move their statistics, and all else stays; then the release samples."""
    models = i2v if arg else t2v
    weights = tmp_path / "weights"
    shutil.copytree(models.origin, weights)
    outcome = training_runs.run(
        f"tora_cogvideox.py:runlocal,stage={stage}{arg}",
        tmp_path / "run",
        training_runs.source(clips),
        f"--weights={weights}",
        "--config.evaluation.clips=0",
        "--config.optim.lr=0.01",
        "--config.optim.warmup=0",
    )
    assert outcome.code == 0, outcome.stderr
    *steps, judged = outcome.metrics
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(line.keys() == {"step", "loss", "grad_norm"} for line in steps)
    assert judged["objective"] > 0
    before, after = (
        release.load(folder, parts=cogvideox.PARTS).params for folder in (weights, tmp_path / "run/release")
    )
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
        if not np.array_equal(old, new)
    }
    assert all(path.startswith("tora/extractor") or "motion_fuser" in path for path in changed)
    assert {f"tora/extractor/blocks/norm{i}/{name}" for i in (1, 2) for name in ("mean", "variance")} <= changed
    assert "tora/cogvideox/blocks/motion_fuser/gamma_temporal/kernel" in changed
    assert json.loads((tmp_path / "run/release/config.json").read_text())["backbone"] == "cogvideox"


@pytest.mark.slow  # half a minute to compile
def test_training_the_vae(clips, tmp_path):
    """One net in one phase; what normalises its latents is a field of the config, so the number is said."""
    outcome = training_runs.run("vae.py:backbone=cogvideox,runlocal", tmp_path / "run", training_runs.source(clips))
    assert outcome.code == 0, outcome.stderr
    *steps, judged = outcome.metrics
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(line.keys() == {"step", "loss", "video", "kl", "grad_norm"} for line in steps)
    assert judged["psnr"] > 0
    assert "set vae.scaling to" in outcome.stderr
    assert release.load(tmp_path / "run/release", parts=cogvideox.PARTS).config["backbone"] == "cogvideox"


@pytest.mark.parametrize(
    ("arg", "message"),
    [("backbone=cogvideox,phase=spatial", "trained in one phase"), ("backbone=sora", "opensora, cogvideox")],
)
def test_configs_of_the_vae_that_cannot_be(arg, message):
    with pytest.raises(ValueError, match=message):
        vae.get_config(arg)
