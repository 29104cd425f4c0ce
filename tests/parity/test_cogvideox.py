"""The released Tora on CogVideoX against its authors' two implementations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert_weights import mapping
from convert_weights.tables import t5, tora_cogvideox
from tests.parity import cogvideox, golden
from tests.parity.cogvideox import channels_last
from tora_jax.models.cogvideox_motion import MotionExtractor, MotionFuser
from tora_jax.models.cogvideox_positions import fit_grid, rotary_tables
from tora_jax.models.t5 import T5Encoder

FILES = ["cogvideox_transformer", "cogvideox_transformer_motion", "cogvideox_transformer_i2v"]
SAT_FILES = ["cogvideox_transformer_sat", "cogvideox_transformer_sat_i2v"]


class Case:
    """A transformer's file: inputs, model, parameters."""

    def __init__(self, name: str, **changes):
        self.data = golden.load(name)
        self.model = cogvideox.tora_of(self.data.config, self.data["in/text"].shape[1], **changes)
        self.params = cogvideox.load_params(self.model, cogvideox.weights(self.data))
        flow = self.data.get("in/flow")
        self.flow = None if flow is None else channels_last(flow)

    def inputs(self):
        data, channels = self.data, self.model.cogvideox["out_channels"]
        x = channels_last(data["in/x"])
        given = x[..., channels:] if x.shape[-1] > channels else None
        return (x[..., :channels], jnp.asarray(data["in/t"], jnp.float32), jnp.asarray(data["in/text"])), given

    def __call__(self, motion=None, **changes):
        model = self.model.clone(cogvideox={**self.model.cogvideox, **changes})
        inputs, given = self.inputs()
        return jax.jit(model.apply)({"params": self.params}, *inputs, motion, given=given)


@pytest.mark.parametrize("name", FILES)
def test_transformer(name):
    case = Case(name)
    golden.assert_close(case(case.flow), channels_last(case.data["out/pred"]), 1e-5)
    for output, motion, changes in (
        ("out/pred_no_motion", None, {}),
        ("out/pred_sat_positions", case.flow, {"add_positions": False}),
    ):
        if (want := case.data.get(output)) is not None:
            golden.assert_close(case(motion, **changes), channels_last(want), 1e-5)


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("name", SAT_FILES)
def test_authors_transformer(name, eps):
    case = Case(name)
    got = case(case.flow, final_eps=eps)
    golden.assert_close(got, channels_last(case.data["out/pred"]), 1e-5 if eps == 1e-6 else 2e-5)


def test_fusion_once_for_all_steps():
    """Gamma and beta made beforehand serve any strength; 0 is plain CogVideoX."""
    case = Case("cogvideox_transformer_motion")
    inputs, given = case.inputs()
    apply = functools.partial(case.model.apply, {"params": case.params})
    fusion = jax.jit(lambda flow: apply(apply(flow, method="extract"), method="fusion"))(case.flow)
    denoise = jax.jit(
        lambda strength: apply(*inputs, given=given, features=fusion, strength=strength, method="denoise")
    )
    for strength, want in ((1.0, "out/pred"), (0.0, "out/pred_no_motion")):
        golden.assert_close(denoise(jnp.full(len(inputs[0]), strength)), channels_last(case.data[want]), 1e-5)


def test_residual_replaces_the_blocks():
    case = Case("cogvideox_transformer_motion")
    inputs, _ = case.inputs()
    apply = functools.partial(case.model.apply, {"params": case.params}, *inputs, case.flow)

    @jax.jit
    def both():
        want, state = apply(mutable=["intermediates"])
        (residual,) = state["intermediates"]["cogvideox"]["residual"]
        return want, apply(residual=residual)

    want, got = both()
    golden.assert_close(got, want, 1e-6)


def test_extractor():
    data = golden.load("cogvideox_extractor")
    c = data.config["extractor"]
    state = cogvideox.weights(data)
    depth = sum(key.endswith(".bn1.weight") for key in state) // c["nums_rb"]
    x = channels_last(np.swapaxes(data["in/latents"], 1, 2))
    model = MotionExtractor(depth, c["patch_size"], c["channels"][0], c["nums_rb"])
    target = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    ignored = [pattern.removeprefix(r"traj_extractor\.") for pattern in tora_cogvideox.IGNORED]
    params = mapping.from_state_dict(tora_cogvideox.EXTRACTOR, state, target, ignored)
    got = jax.jit(model.apply)({"params": params}, x)
    got = got.reshape(depth, -1, *got.shape[3:])
    golden.assert_close(got, channels_last(data["out/features"]), 1e-5)


def test_fuser():
    data = golden.load("cogvideox_fuser")
    hidden, features = (
        channels_last(x.reshape(-1, data.config["frames"], *x.shape[1:])) for x in (data["in/h"], data["in/features"])
    )
    state = {f"0.{key}": value for key, value in cogvideox.weights(data).items()}
    model = MotionFuser(data.config["width"])
    target = jax.eval_shape(model.init, jax.random.key(0), hidden, features)["params"]
    # A single fuser stands in for a stack of one.
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), target)
    params = mapping.from_state_dict(tora_cogvideox.FUSER, state, stacked)
    params = jax.tree.map(lambda leaf: leaf[0], params)
    apply = jax.jit(functools.partial(model.apply, {"params": params}))
    got = apply(hidden, features)
    golden.assert_close(got, channels_last(data["out/h"]).reshape(got.shape), 1e-5)
    shared = apply(hidden, features[:1])  # repeated for all of the batch
    golden.assert_close(shared[:1], got[:1], 1e-6)
    golden.assert_close(shared[1:], apply(hidden[1:], jnp.repeat(features[:1], len(hidden) - 1, 0)), 1e-6)


def rope_cases() -> dict:
    return golden.load("cogvideox_rope").config["cases"]


@pytest.mark.parametrize("name", rope_cases())
def test_rotary_tables(name):
    data, c = golden.load("cogvideox_rope"), rope_cases()[name]
    grid, base = ((c[f"{kind}_height"] // 2, c[f"{kind}_width"] // 2) for kind in ("latent", "base"))
    assert np.array(fit_grid(grid, base)).tolist() == c["crop"]
    tables = rotary_tables(c["latent_frames"], grid, c["head_dim"], base)
    for kind, table in zip(("cos", "sin"), tables, strict=True):
        table = np.asarray(table).reshape(-1, c["head_dim"])
        assert len(table) == c["rows"]
        golden.assert_close(table[data[f"in/rows_{name}"]], data[f"out/{kind}_{name}"], 1e-5)
        golden.assert_close(table.sum(dtype=np.float64), c[f"{kind}_sum"], 1e-5)


def test_text_without_a_mask():
    """T5 as the released code runs it: padding is attended to, and its features are used."""
    data = golden.load("cogvideox_text")
    c = data.config["t5"]
    model = T5Encoder(
        vocab_size=c["vocab_size"],
        width=c["d_model"],
        num_heads=c["num_heads"],
        head_dim=c["d_kv"],
        mlp_dim=c["d_ff"],
        depth=c["num_layers"],
    )
    ids = jnp.asarray(data["in/ids"], jnp.int32)
    mask = jnp.ones(ids.shape, bool)
    target = jax.eval_shape(model.init, jax.random.key(0), ids, mask)["params"]
    params = mapping.from_state_dict(t5.TABLE, t5.untie(cogvideox.weights(data)), target, t5.DROPPED)
    golden.assert_close(jax.jit(model.apply)({"params": params}, ids, mask), data["out/features"], 1e-5)


@pytest.mark.slow
def test_real_widths():
    """Two layers of the real widths; 1.3 GB of float32 weights and the inputs from the seeded rule."""
    data = golden.load("cogvideox_5b_width")
    c, seed = data.config, data.config["seed"]
    x, text, flow = (golden.procedural_input(f"in/{k}", c["inputs"][f"in/{k}"], seed) for k in ("x", "text", "flow"))
    model = cogvideox.tora_of(c, text.shape[1])
    params = cogvideox.load_params(model, cogvideox.weights(data))
    timestep = jnp.asarray(c["t"], jnp.float32)
    got = jax.jit(model.apply)({"params": params}, channels_last(x), timestep, jnp.asarray(text), channels_last(flow))
    golden.assert_close(got, channels_last(data["out/pred"]), 1e-5)
