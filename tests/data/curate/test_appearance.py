"""Curation: perceptual hashes and aesthetic scores."""

import functools

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tora_jax.data.curate import appearance
from tora_jax.data.sprites.clips import make_clip
from tora_jax.io.video import write_video
from tora_jax.models.aesthetic import AestheticHead
from tora_jax.models.clip import CLIP, CLIPText, CLIPVision


def bits(one, other):
    return int(np.bitwise_count(np.frombuffer(one, np.uint8) ^ np.frombuffer(other, np.uint8)).sum())


def test_copies_hash_alike_and_others_do_not(tmp_path):
    codes = {}
    for index in range(6):
        video = make_clip(index, size=128).video
        codes[index] = appearance.perceptual_hash(video[appearance.spread(len(video))])
        assert len(codes[index]) * 8 == appearance.BITS
        smaller = np.stack([cv2.resize(f, (80, 72), interpolation=cv2.INTER_AREA) for f in video])
        darker = (video * 0.8 + 10).astype(np.uint8)
        for name, changed in (("smaller", smaller), ("darker", darker)):
            write_video(tmp_path / "a.mp4", changed, 8)
            frames, info = appearance.read_frames(tmp_path / "a.mp4", appearance.spread, 256)
            assert (len(frames), info) == (appearance.FRAMES, (len(video), *changed.shape[1:3], 8))
            assert bits(appearance.perceptual_hash(frames), codes[index]) <= 16, name
    for i in codes:
        assert all(bits(codes[i], codes[j]) > 32 for j in codes if i != j)


def test_frames_are_spread():
    assert appearance.spread(8) == [1, 3, 5, 7]
    assert appearance.spread(2) == [0, 0, 1, 1]


def small_clip():
    text = CLIPText(vocab_size=8, max_length=4, width=8, mlp_dim=8, depth=1, num_heads=2)
    vision = CLIPVision(image_size=16, patch=8, width=8, mlp_dim=8, depth=1, num_heads=2)
    return CLIP(text, vision, features=6)


def test_aesthetic_score():
    """The mean over the frames of the head on CLIP's embeddings, with CLIP's own normalisation."""
    model, head = small_clip(), AestheticHead(features=6, layers=((0, 4), (2, 1)))
    inputs = jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 16, 16, 3))
    params = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
    head_params = jax.jit(head.init)(jax.random.key(1), jnp.zeros((1, 6)))["params"]
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    got = appearance.clip_judge(model, params, head, head_params)(frames)
    pixels = (frames / 255 - np.array([0.4815, 0.4578, 0.4082])) / np.array([0.2686, 0.2613, 0.2758])
    encode = jax.jit(functools.partial(model.apply, method=CLIP.encode_image))
    embedded = encode({"params": params}, jnp.asarray(pixels, jnp.float32))
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, rtol=1e-5)
    want = np.asarray(head.apply({"params": head_params}, embedded)).mean()
    assert got == pytest.approx(want, abs=1e-4)
