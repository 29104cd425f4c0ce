"""What the parity tests of CogVideoX share: models of a golden file's sizes, and its weights as our parameters."""

import einops
import jax
import jax.numpy as jnp
import numpy as np

from convert_weights import mapping
from convert_weights.tables import tora_cogvideox
from convert_weights.views import Piece
from tests.parity import golden
from tora_jax.models.cogvideox_tora import CogVideoXTora

UNUSED = (*tora_cogvideox.IGNORED, *tora_cogvideox.DROPPED)


def weights(data: golden.Golden, prefix: str = "") -> dict[str, np.ndarray]:
    """The file's state dict: `params/<key>` where it is there, else by the rule in the file's `config`."""
    held, seed = data.params, data.config["seed"]
    keys = {key for key in held if key.startswith(prefix)} | {k for k in data.config["params"] if k.startswith(prefix)}
    return {
        key.removeprefix(prefix): held[key] if key in held else golden.procedural(key, data.config["params"][key], seed)
        for key in sorted(keys)
    }


def fields_of(config: dict, text_length: int) -> dict:
    """Fields of `CogVideoX` for diffusers' options."""
    patch = config.get("patch_size", 2)
    rows, columns = config["sample_height"] // patch, config["sample_width"] // patch
    frames = (config["sample_frames"] - 1) // config.get("temporal_compression_ratio", 4) + 1
    heads, width = config["num_attention_heads"], config["num_attention_heads"] * config["attention_head_dim"]
    learned = config.get("use_learned_positional_embeddings", False)
    return {
        "variant": f"{config['num_layers']}x{width}x{heads}/{patch}",
        "in_channels": config.get("in_channels", 16),
        "out_channels": config.get("out_channels", 16),
        "caption_channels": config["text_embed_dim"],
        "caption_length": text_length,
        "time_channels": config["time_embed_dim"],
        "base_grid": (rows, columns),
        "learned_positions": text_length + frames * rows * columns if learned else 0,
        "add_positions": learned,
    }


def sat_fields_of(config: dict, text_length: int) -> dict:
    """Fields of `CogVideoX` for the options of the authors' own code, which adds no learned positions."""
    patch = config["patch_size"]
    rows, columns = config["latent_height"] // patch, config["latent_width"] // patch
    frames = (config["num_frames"] - 1) // config["time_compressed_rate"] + 1
    learned = config["modules"]["pos_embed_config"]["params"].get("learnable_pos_embed", False)
    return {
        "variant": f"{config['num_layers']}x{config['hidden_size']}x{config['num_attention_heads']}/{patch}",
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "caption_channels": config["modules"]["patch_embed_config"]["params"]["text_hidden_size"],
        "caption_length": text_length,
        "time_channels": config["time_embed_dim"],
        "base_grid": (rows, columns),
        "learned_positions": text_length + frames * rows * columns if learned else 0,
        "final_eps": 1e-6,
    }


def tora_of(config: dict, text_length: int, **changes) -> CogVideoXTora:
    """The model of a file's `config["transformer"]` or `config["sat"]`."""
    fields = sat_fields_of(config["sat"], text_length) if "sat" in config else None
    return CogVideoXTora((fields or fields_of(config["transformer"], text_length)) | changes)


def param_shapes(model: CogVideoXTora, motion: bool = True):
    fields = model.cogvideox
    x = jnp.zeros((1, 1, model.patch, model.patch, model.in_channels))
    text = jnp.zeros((1, 1, model.caption_channels))
    given = jnp.zeros((*x.shape[:4], fields["in_channels"] - model.in_channels))
    # The table's size says nothing about the inputs of this call.
    model = model.clone(cogvideox={**fields, "add_positions": False})
    init = lambda key: model.init(key, x, jnp.zeros(1), text, x if motion else None, given=given)["params"]  # noqa: E731
    return jax.eval_shape(init, jax.random.key(0))


def load_params(model: CogVideoXTora, state: dict) -> dict:
    """By the table, from either form's names; the model has fusers and extractor if the state has them."""
    pieces = {key: Piece(key) for key in state}
    if tora_cogvideox.is_sat(state):
        pieces = tora_cogvideox.from_sat({key: value.shape for key, value in state.items()})

    def read(name: str) -> np.ndarray:
        return pieces[name].cut(state[pieces[name].key])

    motion = any(key.startswith("traj_extractor.") for key in pieces)
    target = param_shapes(model, motion)
    return mapping.from_state_dict(tora_cogvideox.TABLE, {name: read(name) for name in pieces}, target, UNUSED)


def channels_last(x):
    """B F C H W, as the golden files of transformer and samplers have it."""
    return jnp.asarray(einops.rearrange(x, "... c h w -> ... h w c"))
