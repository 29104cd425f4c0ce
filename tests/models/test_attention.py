"""Attention's kernels against plain attention: values and gradients, on one device and on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from tora_jax import sharding
from tora_jax.models import attention as module
from tora_jax.models.attention import attention

RULES = tuple(common.training()["rules"].items())


def inputs(q, k, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (q, k, k, q)
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


def out_and_grad(q, k, v, weights, mask, **options):
    def run(q, k, v):
        out = attention(q, k, v, mask, **options)
        return (out.astype(jnp.float32) * weights).sum(), out

    (_, out), grads = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *grads


def assert_close(got, want, tolerance=1e-5):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


SHAPES = {
    "frames": ((2, 3, 150, 2, 72), (2, 3, 150, 2, 72), None),  # 150 is padded to the block, 72 to 128
    "text": ((2, 2, 40, 2, 8), (2, 37, 2, 8), (3, 37)),  # each sample its own number of tokens
    "tracks": ((1, 2, 6, 2, 8), (1, 2, 6, 2, 8), (5,)),  # a padded frame
}


@pytest.mark.parametrize("name", SHAPES)
def test_splash(name):
    """TPUs' kernel, interpreted."""
    q, k, valid = SHAPES[name]
    mask = None if valid is None else jnp.arange(k[-3])[None] < jnp.array(valid)[:, None]
    want, got = (jax.jit(functools.partial(out_and_grad, backend=b))(*inputs(q, k), mask) for b in ("xla", "splash"))
    assert_close(got, want)


def test_splash_on_a_mesh():
    """Each device works on its own samples, frames and heads: nothing is sent."""
    mesh = sharding.make_mesh("data=2,seq=2,tensor=2")
    q, k, valid = (2, 2, 40, 2, 8), (2, 37, 2, 8), jnp.array([3, 37])
    mask = jnp.arange(37)[None] < valid[:, None]
    options = {"axes": ("batch", "time", None)}
    want = out_and_grad(*inputs(q, k), mask, backend="xla")
    with sharding.use(mesh, RULES):
        names = ("batch", "time", None, "hidden", None), *[("batch", None, "hidden", None)] * 2
        names = [*names, names[0]]
        placed = [
            jax.device_put(x, jax.NamedSharding(mesh, sharding.spec(x.shape, axes)))
            for x, axes in zip(inputs(q, k), names, strict=True)
        ]
        forward = jax.jit(functools.partial(attention, backend="splash", **options))
        text = forward.lower(*placed[:3], mask).compile().as_text()
        got = jax.jit(functools.partial(out_and_grad, backend="splash", **options))(*placed, mask)
    assert_close(got, want)
    assert "all-gather" not in text
    assert "all-to-all" not in text


def test_splash_in_half_precision():
    q, k, _ = SHAPES["tracks"]
    want = out_and_grad(*(x.astype(jnp.float32) for x in inputs(q, k, "bfloat16")), None, backend="xla")
    got = out_and_grad(*inputs(q, k, "bfloat16"), None, backend="splash")
    assert_close([x.astype(jnp.float32) for x in got], want, 2e-2)  # a bfloat16 has 8 bits


@pytest.mark.accelerator
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_of_this_accelerator(name):
    """cuDNN's on GPUs, splash on TPUs: JAX_PLATFORMS=cuda (or tpu) python -m pytest -m accelerator"""
    q, k, valid = SHAPES[name]
    mask = None if valid is None else jnp.arange(k[-3])[None] < jnp.array(valid)[:, None]
    backend = {"gpu": "cudnn", "tpu": "splash"}[jax.default_backend()]
    want = out_and_grad(*(x.astype(jnp.float32) for x in inputs(q, k, "bfloat16")), mask, backend="xla")
    got = out_and_grad(*inputs(q, k, "bfloat16"), mask, backend=backend)
    assert_close([x.astype(jnp.float32) for x in got], want, 3e-2)


@pytest.mark.parametrize(
    ("platform", "dtype", "keys", "width", "plain", "want"),
    [
        ("tpu", "bfloat16", 1590, 72, True, "splash"),
        ("tpu", "float32", 300, 72, True, "splash"),
        ("tpu", "bfloat16", 60, 72, True, "xla"),  # tracks are short
        ("tpu", "bfloat16", 1590, 72, False, "xla"),  # T5's biases
        ("gpu", "bfloat16", 1590, 72, True, "cudnn"),
        ("gpu", "float32", 1590, 72, True, "xla"),
        ("gpu", "bfloat16", 1590, 512, True, "xla"),  # the VAE's one wide head
        ("cpu", "bfloat16", 1590, 72, True, "xla"),
    ],
)
def test_auto(monkeypatch, platform, dtype, keys, width, plain, want):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    q, k = (jnp.zeros((1, length, 2, width), dtype) for length in (40, keys))
    assert module._best(q, k, plain) == want


def test_the_mesh_says_which_devices():
    with sharding.use(sharding.make_mesh("data=2"), RULES):
        assert sharding.platform() == "cpu"
    assert sharding.platform() == "cpu"


def test_mistakes():
    q, k, v, _ = inputs((1, 4, 2, 8), (1, 4, 2, 8))
    with pytest.raises(ValueError, match=r"unknown attention 'flash'; choose one of auto, xla, cudnn, splash"):
        attention(q, k, v, backend="flash")
    with pytest.raises(ValueError, match="neither biases nor a causal form"):
        attention(q, k, v, backend="splash", causal=True)


@pytest.mark.parametrize(("length", "block"), [(60, 128), (300, 384), (1590, 256), (3600, 384), (4096, 512)])
def test_blocks(length, block):
    assert module._block(length) == block
