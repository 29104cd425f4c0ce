"""What is compiled and timed: the compiled functions of train.py and sample.py, and shapes of their arguments."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_flags
from tora_jax.configs.sampling import Settings

from tora_jax import sharding
from tora_jax.backbones import assembly
from tora_jax.conditioning.images import Given
from tora_jax.data.precompute import encoding
from tora_jax.diffusion import sampler
from tora_jax.models import eight_bit
from tora_jax.sampling.inputs import Inputs
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


def params_of(config, parts, mesh: Mesh, rules: sharding.Rules, part: str, dtype=None):
    """Shapes of a part's parameters where they lie on a mesh; `dtype` replaces float32."""
    kind = assembly.backbone(config)
    shapes = jax.eval_shape(functools.partial(assembly.init_params, kind, parts), jax.random.key(0))
    shapes = {part: shapes[part]}
    if dtype is not None:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    if part == "tora" and getattr(parts["tora"], "eight_bit", False):
        shapes["tora"] = kind.quantize(shapes["tora"], eight_bit.shapes)
    return placed(shapes, sharding.param_shardings(shapes, mesh, rules))


def placed(shapes, shardings):
    """Shapes with their shardings: a tree of them, or one for all."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), shapes, shardings)


def train(config, parts, mesh, rules, size, batch):
    """train.py's step, and shapes of its arguments."""
    kind = assembly.backbone(config)
    params = params_of(config, parts, mesh, rules, "tora")
    job = Job(config, kind, parts)
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
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), whole(mesh))
    return jit_train_step(job, optimizer, state), (state, frozen, clips, key)


def text(config, parts, mesh, rules, size, batch):
    """The encoding of captions, and shapes of its arguments."""
    params = params_of(config, parts, mesh, rules, "t5", parts["t5"].dtype)["t5"]
    shape = batch, parts["tora"].caption_length
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool)
    return models_of(config, parts).encode_text, (params, *placed(tokens, whole(mesh)))


def motion(config, parts, mesh, rules, size, batch):
    """From coloured maps to what the denoiser is told of them, and shapes of the arguments."""
    models = models_of(config, parts)
    params = params_of(config, parts, mesh, rules, "tora", jnp.bfloat16)
    params |= params_of(config, parts, mesh, rules, models.backbone.MOTION, _dtype(models.motion_vae))
    maps = jax.ShapeDtypeStruct((batch, size["num_frames"], size["height"], size["width"], 3), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    return models.extract, (params, *placed((maps, keys), whole(mesh)))


def sample(config, parts, mesh, rules, size, batch):
    """One step of sample.py with guidance, and shapes of its arguments."""
    params = params_of(config, parts, mesh, rules, "tora", jnp.bfloat16)["tora"]
    models = models_of(config, parts)
    settings = Settings(**{name: config["sampling"][name] for name in ("solver", "steps", "guidance")}, **size)
    method = models.method(settings.solver)
    x = jax.ShapeDtypeStruct((batch, *latent_shape(parts, **size)), jnp.float32)
    with sharding.use(mesh, rules):
        features, conditions = jax.eval_shape(functools.partial(_told, models, settings, size, batch), params)
    features = jax.tree.map(lambda leaf: placed(leaf, _features(leaf, mesh, rules)), features)
    times = method.process.times(settings.steps, size["height"], size["width"], x.shape[1])
    solver = method.solver
    coefficients = jax.tree.map(jnp.asarray, solver.coefficients(method.process, times, 1))
    at = Step(jnp.asarray(times[1:4]), coefficients, x if solver.noisy else None)
    rest = (x, conditions, at, (jnp.float32(0), jnp.float32(0)), jax.eval_shape(solver.init, x))
    x, conditions, at, weights, memory = placed(rest, whole(mesh))
    return sampler.step, (method, params, x, at, weights, sampler.Told(conditions, features), memory)


def _told(models: assembly.Models, settings: Settings, size: dict, batch: int, tora: Any) -> tuple[Any, dict]:
    """What the denoiser is told by requests with a trajectory, from the functions that sampling calls."""
    kind, parts = models.backbone, models.parts
    fresh = assembly.init_params(kind, parts, jax.random.key(0))
    models = dataclasses.replace(models, params={**fresh, "tora": tora})
    shape = size["num_frames"], size["height"], size["width"], 3
    images = {0: Given(np.zeros(shape[1:], np.uint8), 0.0)} if models.tora.given_channels else {}
    inputs = [Inputs("a star.", np.full((1, shape[0], 2), 0.5, np.float32), images)] * batch
    keys = jax.random.split(jax.random.key(0), batch)
    features = models.extract(models.params, jnp.zeros((batch, *shape)), keys)
    return features, kind.conditions(models, inputs, settings) | kind.given(models, inputs, settings, keys)[1]


def _features(leaf: jax.ShapeDtypeStruct, mesh: Mesh, rules: sharding.Rules) -> NamedSharding:
    """Where features [depth, b, t, h, w, m] lie: over the frames, or else over the rows, that the mesh divides."""
    with sharding.use(mesh, rules):
        over = (None, None, "time", None, None, None)
        if leaf.shape[2] % sharding.shards("time"):
            over = (None, None, None, "space", None, None)
        return NamedSharding(mesh, sharding.spec(leaf.shape, over))


def decode(config, parts, mesh, rules, size, batch):
    """The decoding of latents to a video, and shapes of its arguments."""
    params = params_of(config, parts, mesh, rules, "vae", _dtype(parts["vae"]))["vae"]
    latents = jax.ShapeDtypeStruct((batch, *latent_shape(parts, **size)), jnp.float32)
    return models_of(config, parts).decode, (size["num_frames"], params, placed(latents, whole(mesh)))


def encode(config, parts, mesh, rules, size, batch):
    """The encoding of clips for training, and shapes of its arguments; each device has its own in precompute."""
    params = params_of(config, parts, mesh, rules, "vae", _dtype(parts["vae"]))["vae"]
    clips = jax.ShapeDtypeStruct((batch, size["num_frames"], size["height"], size["width"], 3), jnp.uint8)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    run = encoding.compiled(parts["vae"])
    return run, (params, *placed((clips, keys), sharding.batch_sharding(mesh, rules, batch)))


def whole(mesh: Mesh) -> NamedSharding:
    """Of arrays that all devices hold."""
    return NamedSharding(mesh, PartitionSpec())


def models_of(config, parts) -> assembly.Models:
    """The compiled functions of a config's parts, without parameters."""
    kind = assembly.backbone(config)
    return assembly.Models(kind, parts, {}, assembly.tokenizer(kind, parts, None), "", config["sampling"])


def _dtype(vae: nn.Module):
    """Of a VAE's weights in a release folder."""
    return getattr(vae, "dtype", jnp.float32)


JOBS = {"train": train, "text": text, "motion": motion, "sample": sample, "decode": decode, "encode": encode}
