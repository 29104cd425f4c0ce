"""ST-DiT against the reference STDiT3."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert_weights import mapping
from convert_weights.tables import stdit3
from tests.parity import golden
from tora_jax.models.stdit import STDiT


def model_of(config: dict, params: dict) -> STDiT:
    """The model of a file's config; the patch and the channels stand in its patch embedding [c, in, 1, p, p]."""
    _, in_channels, _, patch, _ = params["x_embedder.proj.weight"].shape
    return STDiT(
        variant=f"{config['depth']}x{config['hidden_size']}x{config['num_heads']}/{patch}",
        in_channels=in_channels,
        caption_channels=config["caption_channels"],
        caption_length=config["model_max_length"],
        qk_norm=config.get("qk_norm", True),
        base_resolution=config["input_sq_size"],
    )


def arguments(x, config: dict) -> dict:
    return {k: jnp.full(len(x), float(config[k])) for k in ("fps", "height", "width")}


def params_shape(model: STDiT):
    x, text = jnp.zeros((1, 1, 2, 2, model.in_channels)), jnp.zeros((1, 1, model.caption_channels))
    one = jnp.ones(1)
    init = lambda key: model.init(key, x, one, text, fps=one, height=one, width=one)["params"]  # noqa: E731
    return jax.eval_shape(init, jax.random.key(0))


def load_params(model: STDiT, state) -> dict:
    return mapping.from_state_dict(stdit3.TABLE, state, params_shape(model), stdit3.IGNORED)


def channels_last(x):
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


@pytest.mark.parametrize(
    "name", ["stdit3_text_mask", "stdit3_odd_frame_mask", "stdit3_image_no_qknorm", "stdit3_head_dim_72"]
)
def test_output(name):
    data = golden.load(name)
    model = model_of(data.config, data.params)
    params = load_params(model, data.params)
    x = channels_last(data["in/x"])
    masks = {
        target: None if data.get(source) is None else jnp.asarray(data[source], bool)
        for target, source in (("text_mask", "in/y_mask"), ("frame_mask", "in/x_mask"))
    }
    got = jax.jit(model.apply)({"params": params}, x, data["in/t"], data["in/y"], **arguments(x, data.config), **masks)
    golden.assert_close(got, channels_last(data["out/pred"]), 1e-5)


def test_round_trip():
    """Converting and reverting gives back every byte."""
    data = golden.load("stdit3_odd_frame_mask")
    shapes = {k: v.shape for k, v in mapping.flatten(params_shape(model_of(data.config, data.params))).items()}
    moves = mapping.plan(stdit3.TABLE, {k: v.shape for k, v in data.params.items()}, shapes)
    state = mapping.revert(moves, mapping.convert(moves, data.params.__getitem__))
    assert state.keys() == data.params.keys()
    for key, value in data.params.items():
        np.testing.assert_array_equal(state[key], value, strict=True)


def test_real_key_list():
    """Every key of the released XL/2 has its place, and every parameter its key."""
    model = STDiT("XL/2")
    shapes = {k: v.shape for k, v in mapping.flatten(params_shape(model)).items()}
    moves = mapping.plan(stdit3.TABLE, golden.checkpoint_keys("stdit3_xl2"), shapes, stdit3.IGNORED)
    assert {m.target for m in moves} == shapes.keys()


@pytest.mark.slow
def test_xl2_at_full_size():
    """The real 1.2 B model; 4.8 GB of float32 weights from the seeded rule in the file's config."""
    data = golden.load("stdit3_xl2_full")
    config, seed = data.config, data.config["seed"]
    model = STDiT("XL/2")
    keys = golden.checkpoint_keys("stdit3_xl2")
    shapes = {k: v.shape for k, v in mapping.flatten(params_shape(model)).items()}
    moves = mapping.plan(stdit3.TABLE, keys, shapes, stdit3.IGNORED)
    params = mapping.convert(moves, lambda key: golden.procedural(key, keys[key], seed))
    x = channels_last(golden.procedural_input("in/x", config["x"], seed))
    text = golden.procedural_input("in/y", config["y"], seed)
    mask = jnp.arange(text.shape[1])[None] < config["valid_text_tokens"]
    frame_mask = None if config["x_mask"] is None else jnp.asarray(config["x_mask"], bool)
    got = jax.jit(model.apply)(
        {"params": params},
        x,
        jnp.asarray(config["t"], jnp.float32),
        text,
        text_mask=mask,
        frame_mask=frame_mask,
        **arguments(x, config),
    )
    golden.assert_close(got, channels_last(data["out/pred"]), 1e-5)
