"""The T5 encoder against transformers' T5EncoderModel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert_weights import mapping
from convert_weights.tables import t5
from tests.parity import golden
from tora_jax.models.t5 import T5Encoder


@pytest.fixture(scope="module")
def data():
    return golden.load("t5_encoder")


@pytest.fixture(scope="module")
def model(data):
    c = data.config
    assert c["feed_forward_proj"] == "gated-gelu"
    return T5Encoder(
        vocab_size=c["vocab_size"],
        width=c["d_model"],
        num_heads=c["num_heads"],
        head_dim=c["d_kv"],
        mlp_dim=c["d_ff"],
        depth=c["num_layers"],
        relative_buckets=c["relative_attention_num_buckets"],
        relative_max_distance=c["relative_attention_max_distance"],
    )


@pytest.fixture(scope="module")
def params(data, model):
    return mapping.from_state_dict(t5.TABLE, t5.untie(data.params), params_shape(model), t5.DROPPED)


def params_shape(model: T5Encoder):
    ids = jnp.zeros((1, 2), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), ids, ids > 0)["params"]


def target_shapes(model: T5Encoder):
    return {path: leaf.shape for path, leaf in mapping.flatten(params_shape(model)).items()}


def test_output(data, model, params):
    """Every position, the padded ones too."""
    got = jax.jit(model.apply)({"params": params}, data["in/input_ids"], data["in/attention_mask"] > 0)
    golden.assert_close(got, data["out/last_hidden_state"], 1e-5)


def test_padding_never_changes_a_token(data, model, params):
    """Bit for bit: a masked key's softmax weight is exactly zero."""
    ids = data["in/input_ids"]
    mask = np.broadcast_to(np.arange(ids.shape[1]) < ids.shape[1] // 2, ids.shape)
    other = np.where(mask, ids, np.random.default_rng(0).integers(0, data.config["vocab_size"], ids.shape))
    assert (other != ids).any()
    apply = jax.jit(model.apply)
    got, want = (np.asarray(apply({"params": params}, x.astype(np.int32), mask)) for x in (other, ids))
    np.testing.assert_array_equal(got[mask], want[mask])


def test_bfloat16_stays_close():
    """The residual stream is float32: only the products are rounded."""
    model = T5Encoder(vocab_size=64, width=32, num_heads=4, head_dim=8, mlp_dim=48, depth=3)
    ids = jax.random.randint(jax.random.key(0), (2, 20), 0, 64)
    params = jax.jit(model.init)(jax.random.key(1), ids, ids > 5)
    want, got = (jax.jit(model.clone(dtype=d).apply)(params, ids, ids > 5) for d in (jnp.float32, jnp.bfloat16))
    assert got.dtype == jnp.float32
    assert 0 < np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < 0.05


def test_float16_is_refused(model):
    with pytest.raises(ValueError, match="float16"):
        params_shape(model.clone(dtype=jnp.float16))


def test_real_key_list():
    """Every key of the XXL encoder has its place, and every parameter its key, from the headers alone."""
    keys = golden.checkpoint_keys("t5_v1_1_xxl_encoder")
    assert all(name in keys for name in t5.TIED)
    targets = target_shapes(T5Encoder())
    moves = mapping.plan(t5.TABLE, t5.untie(keys), targets)
    assert {move.target for move in moves} == targets.keys()
    assert sum(len(move.sources) for move in moves) == len(keys) - 1  # the tied pair fills one place


@pytest.mark.parametrize("names", [t5.TIED[:1], t5.TIED[1:], t5.TIED])
def test_round_trip_of_either_tied_name(data, model, names):
    """The embedding under one name or the other or both; reverting gives back every byte."""
    table = next(data.params[name] for name in t5.TIED if name in data.params)
    state = {key: value for key, value in data.params.items() if key not in t5.TIED}
    source = t5.untie(state | {name: table.copy() for name in names})
    moves = mapping.plan(t5.TABLE, {k: v.shape for k, v in source.items()}, target_shapes(model))
    back = mapping.revert(moves, mapping.convert(moves, source.__getitem__))
    assert back.keys() == state.keys() | {names[0]}
    for key, value in (state | {names[0]: table}).items():
        np.testing.assert_array_equal(back[key], value, strict=True)


def test_tied_names_must_hold_one_tensor(data):
    name, copy = t5.TIED
    table = next(data.params[n] for n in t5.TIED if n in data.params)
    changed = table.copy()
    changed[0, 0] += 1
    with pytest.raises(mapping.ConversionError, match="differ"):
        t5.untie({name: table, copy: changed})
    with pytest.raises(mapping.ConversionError, match="differ"):
        t5.untie({name: table.shape, copy: (1, *table.shape)})


def test_the_decoder_of_a_whole_t5_is_left_out(data, model):
    whole = t5.untie(data.params) | {"lm_head.weight": np.ones(1), "decoder.block.0.x.weight": np.ones(1)}
    mapping.from_state_dict(t5.TABLE, whole, params_shape(model), t5.DROPPED)
    with pytest.raises(mapping.ConversionError, match=r"encoder\.extra"):
        mapping.from_state_dict(t5.TABLE, whole | {"encoder.extra": np.ones(1)}, params_shape(model), t5.DROPPED)
