"""Models with weights that went through the real command: PyTorch-named file -> release folder -> model.

The other parity tests hand the golden weights to the tables directly; here they pass through every step that a
user's checkpoint passes through. Full size with `pytest -m slow -s tests/parity/test_converted.py`.
"""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import checkpoints
from tests.converting import CASES, main, stdit_variant, write_source
from tests.diffusion.stepping import Stepper
from tests.parity import golden, test_clip, test_rectified_flow, test_stdit, test_vae
from tora_jax.checkpoints import release
from tora_jax.models.stdit import STDiT
from tora_jax.models.t5 import T5Encoder


def converted(name: str, folder):
    """The parameters of a golden file's model, by way of two files."""
    argv = write_source(folder / f"{name}.safetensors", name)
    assert main([*argv, str(folder / name)]) == 0
    return release.load_part(folder / name, CASES[name][1])


def test_stdit3(tmp_path):
    data = golden.load("stdit3_text_mask")
    x = test_stdit.channels_last(data["in/x"])
    masks = {"text_mask": data.get("in/y_mask"), "frame_mask": data.get("in/x_mask")}
    masks = {name: None if mask is None else jnp.asarray(mask, bool) for name, mask in masks.items()}
    apply = jax.jit(test_stdit.model_of(data.config, data.params).apply)
    params = {"params": converted("stdit3_text_mask", tmp_path)}
    arguments = test_stdit.arguments(x, data.config)
    got = apply(params, x, data["in/t"], data["in/y"], **arguments, **masks)
    golden.assert_close(got, test_stdit.channels_last(data["out/pred"]), 1e-5)


def test_autoencoder_kl(tmp_path):
    data = golden.load("autoencoder_kl")
    model, *_ = test_vae.spatial_case(data)
    params = converted("autoencoder_kl", tmp_path)
    mean, _ = test_vae.run(model, params, "encode", test_vae.channels_last(data["in/x"]))
    golden.assert_close(test_vae.channels_first(mean), data["out/mean"], 1e-5)
    recon = test_vae.run(model, params, "decode", test_vae.channels_last(data["out/mean"]))
    golden.assert_close(test_vae.channels_first(recon), data["out/recon"], 1e-5)


def test_t5(tmp_path):
    data = golden.load("t5_encoder")
    params = converted("t5_encoder", tmp_path)
    # Every size was read off the file; the largest distance shows in no shape.
    fields = release.read_config(tmp_path / "t5_encoder")["t5"]
    model = T5Encoder(**{**fields, "relative_max_distance": data.config["relative_attention_max_distance"]})
    got = jax.jit(model.apply)({"params": params}, data["in/input_ids"], data["in/attention_mask"] > 0)
    golden.assert_close(got, data["out/last_hidden_state"], 1e-5)


def test_clip_logits(tmp_path):
    data = golden.load("clip")
    pixels = np.moveaxis(data["in/pixel_values"], 1, -1)
    apply = jax.jit(test_clip.model_of(data.config).apply)
    _, _, logits = apply({"params": converted("clip", tmp_path)}, data["in/input_ids"], pixels)
    golden.assert_close(logits, data["out/logits_per_image"], 1e-5)


def test_open_sora_end_to_end(tmp_path):
    """One caption batch and fixed noise through a converted denoiser and a converted VAE.

    Every step's latent equals the reference sampler's. The pixels have no golden file of their own: the VAE equals
    the reference on its own latents of that length, and here it decodes our last latent and the reference's to
    the same pixels.
    """
    setup = test_rectified_flow.Setup("rflow_t2v")
    c = setup.config
    source, variant = tmp_path / "stdit3.safetensors", stdit_variant(c["stdit"])
    save_file(setup.data.params, source)
    assert main(["stdit3", str(source), str(tmp_path / "stdit3"), "--variant", variant]) == 0
    setup.params = release.load_part(tmp_path / "stdit3", "stdit")

    step = Stepper(jax.jit(setup.passes), test_rectified_flow.times_of(setup), guidance=c["cfg_scale"])
    x = test_stdit.channels_last(setup.data["in/z0"])
    for want in setup.data["out/z_steps"]:
        golden.assert_close(x, test_stdit.channels_last(want), 1e-4)
        x = step(x, passes=2)
    last = test_stdit.channels_last(setup.data["out/z"])
    golden.assert_close(x, last, 1e-4)

    data = golden.load("video_vae_pipeline")
    model, *_ = test_vae.pipeline_case(data)
    decode = functools.partial(test_vae.run, model, converted("video_vae_pipeline", tmp_path), "decode")
    near = min(data.config["frames"], key=lambda count: abs(count - c["num_frames"]))
    recon = decode(test_vae.channels_last(data[f"out/z_{near}"]), num_frames=near)
    golden.assert_close(test_vae.channels_first(recon), data[f"out/recon_{near}"], 1e-5)
    # The two files need not be of one chain: as many frames, and as many channels, as this VAE makes of the latents.
    counts = range(1, 20 * x.shape[1])
    frames = next(n for n in counts if model.latent_frames(n) == x.shape[1])
    channels = len(model.latent_shift)
    ours, theirs = (jnp.concatenate([z] * channels, -1)[..., :channels] for z in (x, last))
    golden.assert_close(decode(ours, num_frames=frames), decode(theirs, num_frames=frames), 1e-4)


# ----------------------------------------------------------------------------------------------------------
# Full size
# ----------------------------------------------------------------------------------------------------------


def full_size(kind: str, part: str, folder):
    """Parameters of a seeded checkpoint of the real size; the files are gone when they are read."""
    source = folder / f"{kind}.safetensors"
    checkpoints.make(kind, source)
    try:
        assert main([kind, str(source), str(folder / kind)]) == 0
        source.unlink()
        return release.load_part(folder / kind, part)
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_xl2_at_full_size(tmp_path):
    """4.5 GB written, converted, read; `-s` shows the error."""
    data = golden.load("stdit3_xl2_full")
    config, seed = data.config, data.config["seed"]
    params = full_size("stdit3", "stdit", tmp_path)
    x = test_stdit.channels_last(golden.procedural_input("in/x", config["x"], seed))
    text = golden.procedural_input("in/y", config["y"], seed)
    mask = jnp.arange(text.shape[1])[None] < config["valid_text_tokens"]
    frame_mask = None if config["x_mask"] is None else jnp.asarray(config["x_mask"], bool)
    timestep = jnp.asarray(config["t"], jnp.float32)
    masks = {"text_mask": mask, "frame_mask": frame_mask}
    arguments = test_stdit.arguments(x, config)
    got = jax.jit(STDiT("XL/2").apply)({"params": params}, x, timestep, text, **masks, **arguments)
    golden.assert_close(got, test_stdit.channels_last(data["out/pred"]), 1e-5)


@pytest.mark.slow
def test_video_vae_at_full_size(tmp_path):
    """1.6 GB written, converted, read; `-s` shows the errors."""
    data = golden.load("video_vae_full")
    params = full_size("vae", "vae", tmp_path)
    model, _ = test_vae.full_size()
    x = golden.procedural_input("in/x", data.config["x"], data.config["seed"]) * np.float32(data.config["x_factor"])
    z = test_vae.channels_first(test_vae.run(model, params, "encode", test_vae.channels_last(x)))
    latents = test_vae.channels_last(data["out/z"])
    recon = test_vae.channels_first(test_vae.run(model, params, "decode", latents, num_frames=x.shape[2]))
    golden.assert_close(z, data["out/z"], 1e-4)
    golden.assert_close(recon, data["out/recon"], 1e-4)
