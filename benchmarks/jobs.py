"""What is compiled and timed: the compiled functions of train.py and sample.py, and shapes of their arguments."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_flags

from tora_jax import sharding
from tora_jax.backbones import assembly, opensora
from tora_jax.diffusion import sampler
from tora_jax.training import optim
from tora_jax.training.job import Job
from tora_jax.training.step import init_state, jit_train_step
from tora_jax.typing import Step


def define_flags(values: flags.FlagValues, argv: list[str]) -> None:
    """What all benchmarks of the models have."""
    to = {"flag_values": values}
    config_flags.DEFINE_config_file("config", "configs/tora.py:stage=1", "Config of a job.", sys_argv=argv, **to)
    flags.DEFINE_boolean("help", False, "Shows this.", short_name="h", **to)
    flags.DEFINE_string("mesh", None, "Such as data=4,fsdp=4; none = the config's.", **to)
    flags.DEFINE_integer("num_frames", 51, "Frames of a clip.", **to)
    flags.DEFINE_integer("height", 480, "Pixels.", **to)
    flags.DEFINE_integer("width", 854, "Pixels.", **to)
    flags.DEFINE_integer("batch", 0, "Clips in a batch; 0 = one for each part of the mesh that has its own.", **to)


def filled(shapes: Any) -> Any:
    """Arrays of shapes with shardings: small random numbers, tokens that are valid, ones for the rest."""

    def fill(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return key
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim > 1:
            return (0.02 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
        return jnp.ones(leaf.shape, leaf.dtype)

    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return tree.unflatten(
        jax.jit(lambda key, leaf=leaf: fill(key, leaf), out_shardings=leaf.sharding)(key)
        for key, leaf in zip(keys, leaves, strict=True)
    )


def latent_shape(parts, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Frames, height, width and channels of the latents of a clip."""
    vae = parts["vae"]
    cells = height // vae.space_factor, width // vae.space_factor
    return vae.latent_frames(num_frames), *cells, parts["tora"].in_channels


def params_of(parts, mesh: Mesh, rules: sharding.Rules, part: str, dtype=None):
    """Shapes of a part's parameters where they lie on a mesh; `dtype` replaces float32."""
    shapes = jax.eval_shape(functools.partial(assembly.init_params, opensora, parts), jax.random.key(0))
    shapes = {part: shapes[part]}
    if dtype is not None:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    return placed(shapes, sharding.param_shardings(shapes, mesh, rules))


def placed(shapes, shardings):
    """Shapes with their shardings: a tree of them, or one for all."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), shapes, shardings)


def train(config, parts, mesh, rules, size, batch):
    """train.py's step, and shapes of its arguments."""
    params = params_of(parts, mesh, rules, "tora")
    job = Job(config, opensora, parts)
    trained, rest = jax.eval_shape(job.split, params)
    frozen = {path: leaf for path, leaf in optim.flatten(params).items() if path in rest}  # with their shardings
    optimizer = job.optimizer(trained)
    state = jax.eval_shape(lambda trained: init_state(trained, optimizer), trained)
    state = placed(state, sharding.param_shardings(state, mesh, rules))
    frames, height, width, channels = latent_shape(parts, **size)
    tora = parts["tora"]
    half = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float16)
    latents = half((batch, frames, height, width, channels))
    text = (batch, tora.caption_length, tora.caption_channels)
    clips = {name: latents for name in ("latent_mean", "latent_std", "motion_mean", "motion_std")}
    clips |= {"text": half(text), "text_mask": jax.ShapeDtypeStruct(text[:2], bool)}
    clips |= {"frame_mask": jax.ShapeDtypeStruct((batch, frames), bool)}
    clips |= {name: jax.ShapeDtypeStruct((batch,), jnp.float32) for name in ("fps", "height", "width")}
    clips = placed(clips, sharding.batch_sharding(mesh, rules, batch))
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), NamedSharding(mesh, PartitionSpec()))
    return jit_train_step(job, optimizer, state), (state, frozen, clips, key)


def text(config, parts, mesh, rules, size, batch):
    """The encoding of captions, and shapes of its arguments."""
    params = params_of(parts, mesh, rules, "t5", parts["t5"].dtype)["t5"]
    shape = batch, parts["tora"].caption_length
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool)
    return _models(parts).encode_text, (params, *placed(tokens, NamedSharding(mesh, PartitionSpec())))


def motion(config, parts, mesh, rules, size, batch):
    """From coloured maps to the extractor's features, and shapes of its arguments."""
    params = params_of(parts, mesh, rules, "tora", jnp.bfloat16) | params_of(parts, mesh, rules, "motion_vae")
    maps = jax.ShapeDtypeStruct((batch, size["num_frames"], size["height"], size["width"], 3), jnp.float32)
    return _models(parts).extract, (params, placed(maps, NamedSharding(mesh, PartitionSpec())), None)


def sample(config, parts, mesh, rules, size, batch):
    """One step of sample.py with guidance, and shapes of its arguments."""
    params = params_of(parts, mesh, rules, "tora", jnp.bfloat16)["tora"]
    frames, height, width, channels = latent_shape(parts, **size)
    tora, dtype = parts["tora"], parts["tora"].stdit["dtype"]
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((batch, frames, height, width, channels), jnp.float32)
    motion = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    rows = 2 * batch
    conditions = {
        "text": jax.ShapeDtypeStruct((rows, tora.caption_length, tora.caption_channels), dtype),
        "text_mask": jax.ShapeDtypeStruct((rows, tora.caption_length), bool),
        "drop_text": jax.ShapeDtypeStruct((rows,), bool),
        "has_motion": jax.ShapeDtypeStruct((rows,), bool),
        **{name: jax.ShapeDtypeStruct((rows,), jnp.float32) for name in ("fps", "height", "width")},
    }
    extract = functools.partial(parts["tora"].apply, method="extract")
    features = jax.eval_shape(lambda params, motion: extract({"params": params}, motion), params, motion)
    by_time = nn.logical_to_mesh_axes((None, None, "time", None, None, None), rules)
    features = placed(features, NamedSharding(mesh, by_time))
    times, *weights = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3,), (), ()))
    x, conditions, times, weights = placed((x, conditions, times, tuple(weights)), whole)
    told = sampler.Told(conditions, features)
    return sampler.step, (_models(parts).method("euler"), params, x, Step(times), weights, told, ())


def decode(config, parts, mesh, rules, size, batch):
    """The decoding of latents to a video, and shapes of its arguments."""
    params = params_of(parts, mesh, rules, "vae")["vae"]
    latents = jax.ShapeDtypeStruct((batch, *latent_shape(parts, **size)), jnp.float32)
    latents = placed(latents, NamedSharding(mesh, PartitionSpec()))
    return _models(parts).decode, (size["num_frames"], params, latents)


def _models(parts) -> assembly.Models:
    return assembly.Models(opensora, parts, params={}, tokenizer=None, origin="")


JOBS = {"train": train, "text": text, "motion": motion, "sample": sample, "decode": decode}
