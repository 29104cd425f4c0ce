"""RAFT against torchvision's, and the table against the real checkpoint's key list."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert_weights import mapping
from convert_weights.tables import raft as table
from tests.parity import golden
from tora_jax.models.raft import RAFT

FIELDS = {
    "feature_layers": "feature_encoder_layers",
    "context_layers": "context_encoder_layers",
    "corr_levels": "corr_block_num_levels",
    "corr_radius": "corr_block_radius",
    "motion_corr_layers": "motion_encoder_corr_layers",
    "motion_flow_layers": "motion_encoder_flow_layers",
    "motion_features": "motion_encoder_out_channels",
    "hidden": "recurrent_block_hidden_state_size",
    "flow_hidden": "flow_head_hidden_size",
}
# The large one is too large for the repository: it runs where a folder of golden files has it.
LARGE = ["raft_large"] if (golden.GOLDEN_DIR / "raft_large.safetensors").exists() else []


def model_of(data) -> RAFT:
    """A config without sizes means raft_large; no config names the mask predictor's width."""
    sizes = {ours: data.config[theirs] for ours, theirs in FIELDS.items() if theirs in data.config}
    sizes["mask_hidden"] = len(data["params/mask_predictor.convrelu.0.bias"])
    return RAFT(**{name: tuple(v) if isinstance(v, list) else v for name, v in sizes.items()})


def blank(model: RAFT) -> jax.Array:
    side = 8 * 2**model.corr_levels
    return jnp.zeros((1, side, side, 3))


def params_shape(model: RAFT, **static):
    frame = blank(model)
    return jax.eval_shape(functools.partial(model.init, **static), jax.random.key(0), frame, frame)["params"]


def frames(data) -> list[np.ndarray]:
    return [np.moveaxis(data[f"in/image{i}"], 1, -1) for i in (1, 2)]


def run(model, params, first, second, **static):
    return jax.jit(functools.partial(model.apply, **static))({"params": params}, first, second)


def load(name: str):
    data = golden.load(name)
    model = model_of(data)
    params = mapping.from_state_dict(table.TABLE, data.params, params_shape(model), table.IGNORED)
    return data, model, jax.tree.map(lambda x: x.astype(np.float32), params)


@pytest.fixture(scope="module")
def narrow():
    return load("raft_narrow")


@pytest.mark.parametrize("name", ["raft_narrow", *LARGE])
def test_flow_after_each_update(name):
    data, model, params = load(name)
    updates = data.config["num_flow_updates"]
    got = run(model, params, *frames(data), num_flow_updates=updates, every_update=True)
    want = np.moveaxis(data["out/flows"], 2, -1)
    assert got.shape == want.shape
    for ours, theirs in zip(got, want, strict=True):
        golden.assert_close(ours, theirs, 1e-4)


def test_last_flow_alone_and_pairs_of_a_batch_do_not_mix(narrow):
    """The default returns the last flow; a second pair in the batch changes nothing in the first."""
    data, model, params = narrow
    first, second = frames(data)
    both = np.concatenate([first, second]), np.concatenate([second, first])
    got = run(model, params, *both, num_flow_updates=data.config["num_flow_updates"])
    want = np.moveaxis(data["out/flows"][-1], 1, -1)
    golden.assert_close(got[: len(first)], want, 1e-4)


def test_weights_are_shared_between_updates(narrow):
    _, model, _ = narrow
    assert params_shape(model, num_flow_updates=7) == params_shape(model, num_flow_updates=1)


def test_flow_is_float32_when_convolutions_are_not(narrow):
    _, model, params = narrow
    frame = blank(model)
    flow = jax.eval_shape(model.clone(dtype=jnp.bfloat16).apply, {"params": params}, frame, frame)
    assert flow.shape == (*frame.shape[:3], 2)
    assert flow.dtype == jnp.float32


@pytest.mark.parametrize("axis", [1, 2])
def test_size_that_must_be_padded(narrow, axis):
    _, model, params = narrow
    frame = blank(model)
    frame = jnp.concatenate([frame, jax.lax.slice_in_dim(frame, 0, 4, axis=axis)], axis=axis)
    with pytest.raises(ValueError, match=r"divisible by 8; pad"):
        model.apply({"params": params}, frame, frame)


def test_size_without_products_on_the_last_level(narrow):
    _, model, params = narrow
    frame = blank(model)[:, : 8 * 2 ** (model.corr_levels - 1) - 8]
    with pytest.raises(ValueError, match="at least"):
        model.apply({"params": params}, frame, frame)


def test_no_updates(narrow):
    _, model, params = narrow
    frame = blank(model)
    with pytest.raises(ValueError, match="at least 1"):
        model.apply({"params": params}, frame, frame, num_flow_updates=0)


@pytest.mark.parametrize("name", ["raft_narrow", *LARGE])
def test_round_trip(name):
    """Converting and reverting gives back every byte, the running statistics too."""
    data = golden.load(name)
    shapes = {path: leaf.shape for path, leaf in mapping.flatten(params_shape(model_of(data))).items()}
    source = {k: v for k, v in data.params.items() if not k.endswith("num_batches_tracked")}
    moves = mapping.plan(table.TABLE, {k: v.shape for k, v in source.items()}, shapes)
    back = mapping.revert(moves, mapping.convert(moves, source.__getitem__))
    assert back.keys() == source.keys()
    for key, value in source.items():
        np.testing.assert_array_equal(back[key], value, strict=True)


def test_real_checkpoint_fits():
    """No key of the published raft_large is missing, none is left over."""
    keys = golden.checkpoint_keys("raft_large")
    shapes = {path: leaf.shape for path, leaf in mapping.flatten(params_shape(RAFT())).items()}
    moves = mapping.plan(table.TABLE, keys, shapes, table.IGNORED)
    counters = {k for k in keys if k.endswith("num_batches_tracked")}
    assert {key for move in moves for key in move.sources} == keys.keys() - counters
