"""CLIPSIM: the tokens, the preprocessing and the mean, on a CLIP as small as it gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from tora_jax.checkpoints import release
from tora_jax.errors import UserError
from tora_jax.evals import clip_sim
from tora_jax.models.clip import CLIP, MEAN, STD, CLIPText, CLIPVision

TEXT = {"vocab_size": 12, "max_length": 8, "width": 8, "mlp_dim": 8, "depth": 1, "num_heads": 2}
VISION = {"image_size": 16, "patch": 8, "width": 8, "mlp_dim": 8, "depth": 1, "num_heads": 2}
WORDS = ["[unk]", "a", "red", "star", "over", "waves", ".", "<start>", "<end>"]


@pytest.fixture(scope="module")
def model():
    return CLIP(CLIPText(**TEXT), CLIPVision(**VISION), features=4)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """What `python -m convert_weights clip` writes, with a tokenizer of the form that CLIP's has."""
    folder = tmp_path_factory.mktemp("clip")
    inputs = jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 16, 16, 3))
    params = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
    config = {"clip": {"text": TEXT, "vision": VISION, "features": 4}}
    made = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[unk]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 7), ("<end>", 8)]
    )
    made.save(str(folder / clip_sim.TOKENIZER))
    (folder / "config.json").write_text(release.json.dumps(config))
    flat = {"/".join(path): leaf for path, leaf in release.traverse_util.flatten_dict(params).items()}
    release.save_file(flat, folder / "clip.safetensors")
    return folder


def test_tokens(folder):
    tokenize = clip_sim.tokenizer(folder / clip_sim.TOKENIZER, 8)
    np.testing.assert_array_equal(tokenize("a red star."), [7, 1, 2, 3, 6, 8, 8, 8])
    np.testing.assert_array_equal(tokenize("a red star over waves. a red star"), [7, 1, 2, 3, 4, 5, 6, 8])
    assert tokenize("").dtype == np.int32


@pytest.mark.parametrize("frames", [1, 17])
def test_mean_over_frames(model, folder, frames):
    video = np.random.default_rng(0).integers(0, 256, (frames, 16, 24, 3), np.uint8)
    got = clip_sim.load(folder)(video, "a red star.")
    params = {"params": release.load_part(folder, "clip")}
    ids = jnp.array([[7, 1, 2, 3, 6, 8, 8, 8]])
    pixels = jnp.asarray((video[:, :, 4:20] / 255 - MEAN) / STD, jnp.float32)  # the middle, as high as CLIP wants it
    text, images, _ = jax.jit(model.apply)(params, ids, pixels)
    assert got == pytest.approx(float((images @ text[0]).mean()), abs=1e-5)
    assert -1 <= got <= 1


def test_what_is_missing(folder, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        clip_sim.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"tokenizer\.json: missing; copy it there"):
        clip_sim.tokenizer(tmp_path / clip_sim.TOKENIZER, 8)
    (tmp_path / clip_sim.TOKENIZER).write_text("{}")
    with pytest.raises(UserError, match="is no tokenizer"):
        clip_sim.tokenizer(tmp_path / clip_sim.TOKENIZER, 8)
