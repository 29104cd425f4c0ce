"""Low-rank adapters: nothing at the start, the explicit sum afterwards, released and read back."""

from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from safetensors.flax import save_file

from tora_jax.backbones import assembly
from tora_jax.checkpoints import release
from tora_jax.errors import UserError
from tora_jax.training import lora, optim

RANK, ALPHA = 3, 6.0


@pytest.fixture(scope="module")
def params(tiny_models):
    return dict(tiny_models.params)


@pytest.fixture(scope="module")
def adapter(params):
    return lora.init(params, lora.TEMPORAL, RANK, jax.random.key(0))


def shaken(adapter):
    rng = np.random.default_rng(1)
    return {name: leaf + rng.standard_normal(leaf.shape, np.float32) for name, leaf in adapter.items()}


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def test_default_kernels(adapter):
    stem = "tora/stdit/blocks/temporal"
    kernels = {f"{stem}/attn/qkv", f"{stem}/attn/proj", f"{stem}/mlp/fc1", f"{stem}/mlp/fc2"}
    kernels |= {f"{stem}/cross_attn/{name}" for name in ("q", "kv", "proj")}
    assert adapter.keys() == {f"{name}/kernel/{part}" for name in kernels for part in "ab"}
    assert adapter[f"{stem}/mlp/fc1/kernel/a"].shape == (1, 16, RANK)  # one block
    assert adapter[f"{stem}/mlp/fc1/kernel/b"].shape == (1, RANK, 64)
    a = [leaf for name, leaf in adapter.items() if name.endswith("/a")]
    assert all(0.5 < jnp.std(leaf) * leaf.shape[-2] ** 0.5 < 1.5 for leaf in a)
    assert len({float(leaf.sum()) for leaf in a}) == len(a)  # each with numbers of its own


def test_nothing_at_the_start(adapter, params):
    merged, before = flat(lora.merge(adapter, params, ALPHA)), flat(params)
    assert merged.keys() == before.keys()
    for path, leaf in before.items():
        np.testing.assert_array_equal(merged[path], leaf, strict=True)


def test_merge_is_the_explicit_sum(adapter, params):
    adapter = shaken(adapter)
    merged, before = flat(lora.merge(adapter, params, ALPHA)), flat(params)
    for path, leaf in before.items():
        if f"{path}/a" not in adapter:
            assert merged[path] is leaf
            continue
        a, b = (np.asarray(adapter[f"{path}/{part}"], np.float64) for part in "ab")
        update = ALPHA / RANK * np.stack([x @ y for x, y in zip(a, b, strict=True)])
        np.testing.assert_allclose(merged[path], leaf + update, atol=1e-5)
        assert np.linalg.matrix_rank(update[0]) == RANK


def test_stacks_and_taps_have_their_own():
    params = {"x": {"kernel": jnp.zeros((2, 3, 1, 8, 6))}}
    adapter = shaken(lora.init(params, ["x/kernel"], 2, jax.random.key(0)))
    update = lora.merge(adapter, params, 2.0)["x"]["kernel"]
    for i, j in np.ndindex(2, 3):
        want = adapter["x/kernel/a"][i, j, 0] @ adapter["x/kernel/b"][i, j, 0]
        np.testing.assert_allclose(update[i, j, 0], want, rtol=1e-5, atol=1e-5)


def test_gradients(adapter, params, tiny_models):
    """At the start b alone has gradients; after a step a has, too. Gradients are those of the kernels, projected."""
    keys = jax.random.split(jax.random.key(2), 3)
    x, text = jax.random.normal(keys[0], (1, 2, 4, 4, 4)), jax.random.normal(keys[1], (1, 12, 8))
    one = jnp.ones(1)
    params = dict(params)
    rng = np.random.default_rng(2)
    params["tora"] = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32), params["tora"])

    def loss(params):
        out = tiny_models.tora.apply({"params": params["tora"]}, x, one, text, None, fps=one, height=one, width=one)
        return jnp.square(out).mean()

    def of_adapter(adapter):
        return loss(lora.merge(adapter, params, ALPHA))

    gradient = jax.jit(jax.value_and_grad(of_adapter))
    full = flat(jax.jit(jax.grad(loss))(params))
    before, first = gradient(adapter)
    for name, leaf in first.items():
        path, _, part = name.rpartition("/")
        want = ALPHA / RANK * np.einsum("zir,zio->zro", adapter[f"{path}/a"], full[path]) if part == "b" else 0
        np.testing.assert_allclose(leaf, np.broadcast_to(want, leaf.shape), rtol=1e-4, atol=1e-6, err_msg=name)
    stepped = {name: leaf - 0.1 * first[name] for name, leaf in adapter.items()}
    after, second = gradient(stepped)
    assert after < before
    assert all(np.abs(leaf).max() > 0 for leaf in second.values())


def test_trains_with_the_optimizer(adapter):
    config = {
        "optimizer": "adamw",
        "lr": 1e-2,
        "warmup": 0,
        "decay": "constant",
        "final": 1.0,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-15,
        "clip": 1.0,
        "weight_decay": ((".*/a", 0.1),),
        "lr_multipliers": ((".*/b", 2.0),),
    }
    transform = optim.make(config, adapter, 10)
    updates, _ = transform.update(adapter, transform.init(adapter), adapter)
    assert optax.apply_updates(adapter, updates).keys() == adapter.keys()
    assert optim.ema_update(optim.ema_init(adapter), adapter, 0.9).keys() == adapter.keys()


def test_a_merged_release_is_an_ordinary_one(adapter, params, tiny_config, tmp_path):
    merged = lora.merge(shaken(adapter), params, ALPHA)
    tokenizer = resources.files("tora_jax").joinpath("assets/tokenizer.model")
    release.save(tmp_path / "merged", tiny_config, merged, tokenizer, "Merged.\n")
    models = assembly.load(weights=tmp_path / "merged")
    got = flat(models.params)
    for path, leaf in flat(merged).items():
        np.testing.assert_array_equal(got[path], leaf)


def test_saved_alone(adapter, params, tmp_path):
    adapter = shaken(adapter)
    lora.save(tmp_path / "adapter.safetensors", adapter, ALPHA)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]
    loaded, alpha = lora.load(tmp_path / "adapter.safetensors")
    assert alpha == ALPHA
    want, got = (flat(lora.merge(x, params, ALPHA)) for x in (adapter, loaded))
    for path, leaf in want.items():
        np.testing.assert_array_equal(got[path], leaf)


def test_files_that_are_no_adapters(adapter, tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match=r"x.safetensors: cannot be read"):
        lora.load(path)
    lora.save(path, adapter, ALPHA)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"x.safetensors: cannot be read"):
        lora.load(path)
    save_file({"a": jnp.ones(2)}, path)
    with pytest.raises(UserError, match="is no adapter"):
        lora.load(path)
    save_file({"x/kernel/a": jnp.ones(2)}, path, metadata={"alpha": "1.0"})
    with pytest.raises(UserError, match="is no adapter"):
        lora.load(path)


@pytest.mark.parametrize(
    ("patterns", "rank", "message"),
    [
        (lora.TEMPORAL, 0, "rank 0 should be above 0"),
        (lora.TEMPORAL, 16, r"rank 16 should be .* below that of tora/stdit/blocks/temporal/.*, 16 x"),
        (("tora/stdit/null_caption",), 2, "null_caption"),
        ((r"tora/nowhere/.*",), 2, "nowhere"),
    ],
)
def test_mistakes(params, patterns, rank, message):
    with pytest.raises(UserError, match=message):
        lora.init(params, patterns, rank, jax.random.key(0))


def test_other_weights(adapter, params):
    other = {"tora/stdit/blocks/temporal/attn/qkv/kernel/a": jnp.ones((4, 16, 2))}
    other["tora/stdit/blocks/temporal/attn/qkv/kernel/b"] = jnp.ones((4, 2, 48))
    with pytest.raises(UserError, match=r"for tora/.*/qkv/kernel of \(4, 16, 48\), which is \(1, 16, 48\)"):
        lora.merge(other, params, ALPHA)
    with pytest.raises(UserError, match="which is missing"):
        lora.merge(adapter, {"vae": params["vae"]}, ALPHA)
