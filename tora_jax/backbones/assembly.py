"""All parts of a model as one value: the modules of a config, their parameters and their compiled functions."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import FrozenDict, freeze

from tora_jax import backbones, sharding
from tora_jax.checkpoints import release
from tora_jax.conditioning import text
from tora_jax.diffusion import sampler, solvers
from tora_jax.errors import UserError, closest
from tora_jax.io import files
from tora_jax.io.files import tuples
from tora_jax.io.video import from_float
from tora_jax.programs import Program, code

DEFAULT = "opensora"
# For programs with convolutions over whole frames: the TPU's compiler otherwise searches for a minute on some of them,
# for little by its own estimate (docs/LOG.md). Other compilers make the same of it. Its name and form are others
# since jax 0.11.2, each an error elsewhere (findings/jax_the_option_of_effort.sh).
QUICK = FrozenDict(
    {"exec_time_optimization_effort": -1.0}
    if hasattr(jax.config, "jax_exec_time_optimization_effort")
    else {"optimization_level": "O1"}
)


@dataclasses.dataclass(frozen=True, eq=False)
class Models:
    """All parts of a model with their parameters, and their compiled functions (kept for the next call).

    Attributes:
      backbone: the module of `backbones` that they are of; backbones/opensora.py says what it defines.
      parts: part -> module.
      params: part -> parameter tree; NumPy's arrays are copied to the device for each call, see `load`.
      tokenizer: for `t5`; None where nothing is generated.
      origin: where the parameters come from, for people: a folder, or "random weights (seed 0)".
      sampling: that section of the config: what is to be generated where a person does not say.
    """

    backbone: ModuleType
    parts: Mapping[str, nn.Module]
    params: Mapping[str, Any]
    tokenizer: text.Tokenizer | None
    origin: str
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def tora(self) -> nn.Module:
        """The denoiser, a `typing.Denoiser`."""
        return self.parts["tora"]

    @property
    def vae(self) -> nn.Module:
        """A `typing.VAE`."""
        return self.parts["vae"]

    @property
    def motion_vae(self) -> nn.Module:
        """The VAE of trajectory maps; its parameters go by the name `backbone.MOTION`."""
        return self.parts[self.backbone.MOTION]

    @functools.cached_property
    def encode_text(self) -> Callable:
        """(parameters of T5, tokens, mask) -> features."""
        return _compiled(self.backbone.encode_text, self.parts["t5"])

    @functools.cached_property
    def encode_video(self) -> Callable:
        """(parameters of the VAE, video in -1..1) -> latents: the posteriors' means."""
        return _compiled(_encode_video, self.vae, (), QUICK)

    @functools.cached_property
    def extract(self) -> Callable:
        """(all parameters, RGB trajectory maps in -1..1, keys) -> the extractor's features."""
        return _compiled(self.backbone.extract, self.parts)

    @functools.cached_property
    def denoise(self) -> Callable:
        """A forward pass of the denoiser, not compiled; see `sampler.Method`."""
        return _bound(self.backbone.denoise, self.tora)

    def method(self, solver: str) -> sampler.Method:
        """What the sampler's steps are compiled for.

        Raises:
          UserError: there is no such solver for these weights.
        """
        process = self.backbone.process(self.parts)
        return sampler.Method(self.denoise, process, solvers.find(solver, process))

    @functools.cached_property
    def decode(self) -> Callable:
        """(frames, parameters of the VAE, latents) -> uint8 video, and whether all of it was finite."""
        return _compiled(_decode, self.vae, 0, QUICK)


def _shared(make: Callable[..., Callable]) -> Callable[..., Callable]:
    """The same result for equal arguments, so that a process traces and compiles a model once however often it loads.

    Modules that are not of `modules` may have fields that cannot be compared; then each call makes its own.
    """
    kept = functools.lru_cache(32)(make)

    @functools.wraps(make)
    def find(*args: Any) -> Callable:
        try:
            hash(args)
        except TypeError:
            return make(*args)
        return kept(*args)

    return find


@_shared
def _bound(function: Callable, module: nn.Module | Mapping[str, nn.Module]) -> Callable:
    return functools.partial(function, module)


@_shared
def _compiled(
    function: Callable,
    module: nn.Module | Mapping[str, nn.Module],
    static: int | tuple[int, ...] = (),
    quick: FrozenDict | None = None,
) -> Callable:
    return Program(_bound(function, module), static, compiler_options=None if quick is None else dict(quick))


def _encode_video(vae: nn.Module, params: Mapping, video: jax.Array) -> jax.Array:
    return vae.apply({"params": params}, video, method="encode")


def _decode(vae: nn.Module, num_frames: int, params: Mapping, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    def pixels(frames: jax.Array) -> tuple[jax.Array, jax.Array]:
        return from_float(frames), jnp.isfinite(frames).all((-3, -2, -1))

    video, finite = vae.apply({"params": params}, latents, num_frames, pixels, method="decode")
    # Each device keeps some rows of all frames: put together, a long video would need much of a device's memory.
    return sharding.constrain(video, (None, None, "frames", None, None)), finite.all()


def names() -> list[str]:
    """Of all backbones."""
    return [found.name for found in pkgutil.iter_modules(backbones.__path__) if found.name != "assembly"]


def backbone(config: Mapping[str, Any]) -> ModuleType:
    """The backbone that a config names.

    Raises:
      UserError: there is none of that name.
    """
    name = config.get("backbone", DEFAULT)
    if name not in names():
        raise UserError(f"config: backbone is {name!r}; there are {', '.join(names())}")
    return importlib.import_module(f"{backbones.__name__}.{name}")


def modules(config: Mapping[str, Any]) -> Mapping[str, nn.Module]:
    """The parts that a config names; hashable, and equal for equal configs.

    Raises:
      UserError: for a missing part, or a field that a part does not have.
    """
    config, kind = tuples(config), backbone(config)
    if missing := [part for part in kind.PARTS if part not in config]:
        raise UserError(f"the config has no section {', '.join(missing)}; it needs {', '.join(kind.PARTS)}")
    for section in kind.SECTIONS:
        fields = functools.reduce(lambda at, name: at.get(name), section.split("."), config)
        if fields is None and section in kind.OPTIONAL:
            continue
        if not isinstance(fields, Mapping):
            raise UserError(f"config: {section} should hold the fields of a model")
        known = _fields(kind, section)
        for name in sorted(fields.keys() - known):
            close = closest(name, known) or ", ".join(sorted(known))
            raise UserError(f"config: {section} has no field {name!r}; did you mean {close}?")
    try:
        return FrozenDict({part: module(**freeze(config[part])) for part, module in kind.PARTS.items()})
    except TypeError as error:
        raise UserError(f"config: {error}") from None


def sections(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config goes into a release folder."""
    kept = ("backbone", *backbone(config).PARTS, "sampling")
    return {name: config[name] for name in kept if name in config}


def _fields(kind: ModuleType, section: str) -> set[str]:
    fields = {field.name for field in dataclasses.fields(kind.SECTIONS[section])}
    return fields - {"name", "parent"} - kind.OWN.get(section, set())


def field_names() -> set[str]:
    """Names of all fields that the sections of a config may have."""
    kinds = [backbone({"backbone": name}) for name in names()]
    return {field for kind in kinds for section in kind.SECTIONS for field in _fields(kind, section)}


def init_params(kind: ModuleType, parts: Mapping[str, nn.Module], key: jax.Array) -> dict[str, Any]:
    """Fresh parameters for all parts of a backbone; equal parts start equal."""
    inputs, params = kind.dummies(parts), {}
    keys = jax.random.split(key, len(inputs))
    for own, (part, (args, options)) in zip(keys, inputs.items(), strict=True):
        same = next((other for other in params if parts[other] == parts[part]), None)
        traced = isinstance(key, jax.core.Tracer)
        params[part] = params[same] if same else _initializer(parts[part], traced)(own, args, options)
    return params


@_shared
def _initializer(part: nn.Module, traced: bool) -> Callable[[jax.Array, tuple, dict[str, Any]], dict[str, Any]]:
    """(key, arguments and keywords of a call) -> parameters of a part."""
    # Run once, so fast to compile beats fast to run: half a minute less on a laptop. JAX takes no options in a trace.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" and not traced else None
    return jax.jit(lambda key, args, options: part.init(key, *args, **options)["params"], compiler_options=quick)


def outline(config: Mapping[str, Any], weights: str | Path | None = None) -> Models:
    """Models without parameters, for all that is asked before they are loaded.

    Args:
      weights: the release folder with the tokenizer, where there is one.

    Raises:
      UserError: the config makes no model.
    """
    parts, kind = modules(config), backbone(config)
    tokens = tokenizer(kind, parts, weights) if tokenizer_path(weights).is_file() else None
    return Models(kind, parts, {}, tokens, "not loaded", config.get("sampling", {}))


def load(
    config: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    low_memory: bool = False,
    eight_bit: bool = False,
    place: sharding.Place | None = None,
) -> Models:
    """Builds the parts of a config and fills them.

    All parts are on devices from here on; at the released sizes in bfloat16, T5 alone takes 9.5 GB.

    Args:
      config: plain nested dict with a section for each part of its backbone; None = that of the weights.
      weights: a release folder; None = random weights, which make noise.
      seed: of the random weights.
      low_memory: the parameters stay in the host's memory, and each part is on the device only while it is used.
      eight_bit: the denoiser's kernels take half of bfloat16's room; the video differs a little.
      place: where the parameters lie, not with `low_memory`. None = on the default device.

    Raises:
      UserError: when the config makes no model, or the weights are missing, broken or of another size; or the denoiser
        has no form in 8 bits.
    """
    if config is None:
        if weights is None:
            raise ValueError("load needs a config, weights or both")
        config = release.read_config(weights)
    parts, kind = modules(config), backbone(config)
    if eight_bit:
        if not hasattr(kind, "in_eight_bit"):
            raise UserError("eight_bit: these weights have no form in 8 bits; try low_memory alone")
        parts = freeze(kind.in_eight_bit(parts))
    fits = None if weights is None else _note_of_fit(kind, config, weights)
    shapes = None if weights is None or (fits and fits.exists()) else _shapes(kind, parts)
    on_host = low_memory or eight_bit
    keep = jax.device_get if on_host else (lambda params: params)
    with _host() if on_host else contextlib.nullcontext():
        released = None if weights is None else release.load(weights, keep, kind.PARTS, None if on_host else place)
    if released is not None and shapes is not None:
        _check_sizes(shapes, released.params, str(weights))
        if fits is not None:
            with contextlib.suppress(OSError):  # a full or read-only disk costs the next start a second, no more
                fits.parent.mkdir(parents=True, exist_ok=True)
                fits.touch()
    tokens = tokenizer(kind, parts, weights)
    if released is None:
        with _values_of_a_model():
            params = keep(init_params(kind, parts, jax.random.key(seed)))
        origin = f"random weights (seed {seed})"
    else:
        params, origin = released.params, str(weights)
    kind.check_fit(parts, tokens)
    if eight_bit:
        params = {**params, "tora": kind.quantize(params["tora"])}
    if not low_memory and (eight_bit or place is not None):
        params = jax.device_put(params, place and place(params))
    return Models(kind, parts, params, tokens, origin, config.get("sampling", {}))


def tokenizer(kind: ModuleType, parts: Mapping[str, nn.Module], weights: str | Path | None) -> text.Tokenizer:
    """The tokenizer of `tokenizer_path` for the captions of a backbone.

    Raises:
      UserError: it is missing, or none of T5's.
    """
    return text.Tokenizer(tokenizer_path(weights), parts["tora"].caption_length, **kind.TOKENS)


def _host() -> contextlib.AbstractContextManager:
    """Inside, new arrays are in the host's memory: a part may be too large for the device."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS names another platform alone
        return contextlib.nullcontext()


def tokenizer_path(weights: str | Path | None) -> Path:
    """The sentencepiece model of a release folder, or the one of the small model."""
    folder = str(resources.files("tora_jax").joinpath("assets")) if weights is None else weights
    return files.path(folder) / "tokenizer.model"


def _shapes(kind: ModuleType, parts: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Of all parameters, part -> tree; a second or two of tracing.

    Raises:
      UserError: the fields make no model.
    """
    with _values_of_a_model():
        return jax.eval_shape(functools.partial(init_params, kind, parts), jax.random.key(0))


@contextlib.contextmanager
def _values_of_a_model() -> Iterator[None]:
    """Says what Linen finds wrong with the fields of a config as an error of that config."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise UserError(f"config: these values make no model: {str(error).strip().splitlines()[0]}") from None


def _note_of_fit(kind: ModuleType, config: Mapping[str, Any], weights: str | Path) -> Path | None:
    """The empty file that stands beside the compiled programs once these weights were found to fit this config.

    Its name is made of all that decides: the config, the weights, and this package's code. None where compiled
    programs are not kept.
    """
    if jax.config.jax_compilation_cache_dir is None or not files.path(weights).is_dir():
        return None
    named = json.dumps([flax.__version__, code(), sections(config), release.checksum(weights)], default=str)
    return files.path(jax.config.jax_compilation_cache_dir) / f"fits-{hashlib.sha256(named.encode()).hexdigest()}"


def _check_sizes(want: Mapping, got: Mapping, origin: str) -> None:
    want, got = (
        {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()} for tree in (want, got)
    )
    if differ := sorted(path for path in want.keys() | got.keys() if want.get(path) != got.get(path)):
        path = differ[0]
        raise UserError(
            f"{origin}: weights of another size than the config: {path} is {got.get(path, 'missing')}, "
            f"the config wants {want.get(path, 'none')} ({len(differ)} tensors differ); "
            "leave --config out to use the config of the weights"
        )
