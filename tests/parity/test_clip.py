"""CLIP against transformers' CLIPModel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert_weights import mapping
from convert_weights.tables import clip as table
from tests.parity import golden
from tora_jax.models.clip import CLIP, CLIPText, CLIPVision, clip

TEXT_FIELDS = {
    "vocab_size": "vocab_size",
    "max_length": "max_position_embeddings",
    "eos_id": "eos_token_id",
}
VISION_FIELDS = {"image_size": "image_size", "patch": "patch_size"}
TOWER_FIELDS = {
    "width": "hidden_size",
    "mlp_dim": "intermediate_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "activation": "hidden_act",
}


def model_of(config: dict) -> CLIP:
    text, vision = config["text"], config["vision"]
    return CLIP(
        CLIPText(**{ours: text[theirs] for ours, theirs in (TOWER_FIELDS | TEXT_FIELDS).items()}),
        CLIPVision(**{ours: vision[theirs] for ours, theirs in (TOWER_FIELDS | VISION_FIELDS).items()}),
        features=text["projection_dim"],
    )


def params_shape(model: CLIP):
    size = model.vision.image_size
    ids, pixels = jnp.zeros((1, model.text.max_length), jnp.int32), jnp.zeros((1, size, size, 3))
    return jax.eval_shape(model.init, jax.random.key(0), ids, pixels)["params"]


@pytest.fixture(scope="module")
def data():
    return golden.load("clip")


@pytest.fixture(scope="module")
def model(data):
    return model_of(data.config)


@pytest.fixture(scope="module")
def params(data, model):
    return mapping.from_state_dict(table.TABLE, data.params, params_shape(model), table.IGNORED)


def test_output(data, model, params):
    pixels = np.moveaxis(data["in/pixel_values"], 1, -1)
    text, image, logits = jax.jit(model.apply)({"params": params}, data["in/input_ids"], pixels)
    golden.assert_close(text, data["out/text_embeds"], 1e-5)
    golden.assert_close(image, data["out/image_embeds"], 1e-5)
    golden.assert_close(logits, data["out/logits_per_image"], 1e-5)


def encode_text(model, params, ids):
    return np.asarray(jax.jit(lambda p, x: model.apply(p, x, method="encode_text"))({"params": params}, ids))


def sentences(model, end: int):
    """Random tokens in full length, the end mark in the middle; and the same with other tokens after it."""
    rng, shape = np.random.default_rng(0), (2, model.text.max_length)
    words = [rng.integers(3, end, shape, dtype=np.int32) for _ in range(2)]
    middle = shape[1] // 2
    first, second = words[0], np.concatenate([words[0][:, :middle], words[1][:, middle:]], axis=1)
    first[:, middle] = second[:, middle] = end
    assert (first != second).any()
    return first, second


def with_text(model, **fields):
    return model.clone(text=model.text.clone(**fields))


def test_tokens_after_the_end_mark_change_nothing(model, params):
    """The text is read at the end mark, and what follows is out of its sight."""
    end = model.text.vocab_size - 1
    first, second = (encode_text(with_text(model, eos_id=end), params, x) for x in sentences(model, end))
    np.testing.assert_array_equal(first, second)


def test_legacy_end_mark_is_the_largest_id(model, params):
    """Configs of OpenAI's models say 2; there the end mark is the last word of the vocabulary."""
    end = model.text.vocab_size - 1
    ids, _ = sentences(model, end)
    legacy, real = (encode_text(with_text(model, eos_id=i), params, ids) for i in (2, end))
    np.testing.assert_array_equal(legacy, real)


def test_activation_is_an_option(data, model, params):
    """The exact GELU is near quick_gelu, not equal; another name is an error."""
    ids = np.asarray(data["in/input_ids"])
    a, b = (encode_text(with_text(model, activation=f), params, ids) for f in ("gelu", "quick_gelu"))
    assert 0 < np.abs(a - b).max() < 0.5
    with pytest.raises(ValueError, match="relu"):
        encode_text(with_text(model, activation="relu"), params, ids)


def test_wrong_image_size(data, model, params):
    pixels = jnp.zeros((1, model.vision.image_size + model.vision.patch, model.vision.image_size, 3))
    with pytest.raises(ValueError, match="image tower"):
        model.apply({"params": params}, pixels, method="encode_image")


def test_round_trip(data, model):
    """Converting and reverting gives back every byte, the scalar logit scale too."""
    shapes = {path: leaf.shape for path, leaf in mapping.flatten(params_shape(model)).items()}
    source = {k: v for k, v in data.params.items() if not k.endswith("position_ids")}
    moves = mapping.plan(table.TABLE, {k: v.shape for k, v in source.items()}, shapes)
    back = mapping.revert(moves, mapping.convert(moves, source.__getitem__))
    assert back.keys() == source.keys()
    for key, value in source.items():
        np.testing.assert_array_equal(back[key], value, strict=True)


@pytest.mark.parametrize(("variant", "parameters"), [("ViT-L/14", 427_616_513), ("ViT-B/32", 151_277_313)])
def test_published_sizes(variant, parameters):
    assert sum(leaf.size for leaf in jax.tree.leaves(params_shape(clip(variant)))) == parameters


def test_unknown_variant():
    with pytest.raises(ValueError, match="ViT-B/32"):
        clip("ViT-Z/1")
