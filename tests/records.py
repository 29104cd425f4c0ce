"""Small data sets for the tests, written as TFDS's ArrayRecord folders without its builders."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from tora_jax.data import array_record
from tora_jax.data.sprites.dataset import SpritesConfig, record

SCALE = SpritesConfig(name="tiny", side=48, frames=9, fps=8.0)
FEATURES = tfds.features.FeaturesDict(
    {
        "video": tfds.features.Tensor(shape=(), dtype=np.object_),
        "fps": tfds.features.Scalar(np.float32),
        "caption": tfds.features.Text(),
        "tracks": tfds.features.Tensor(shape=(None, None, 2), dtype=np.float32, encoding="zlib"),
        "visible": tfds.features.Tensor(shape=(None, None), dtype=np.bool_, encoding="zlib"),
        "labels": tfds.features.Tensor(shape=(None, None, None), dtype=np.uint8, encoding="zlib"),
        "objects": tfds.features.Sequence({"colour": tfds.features.Text()}),
    }
)


def latent_frames(frames: int) -> int:
    """Of the VAEs of most configs: micro-frames of 17, and 4 frames to a latent."""
    return frames // 17 * 5 + math.ceil(frames % 17 / 4)


def clips(count: int, split: str = "train", scale: SpritesConfig = SCALE) -> list[dict]:
    """Records of drawn clips, as `sprites` writes them."""
    whole = (record(split, scale, index)[1] for index in range(count))
    found = [{name: one[name] for name in FEATURES} for one in whole]
    return [{**one, "objects": [{"colour": sprite["colour"]} for sprite in one["objects"]]} for one in found]


def write(folder: Path, splits: Mapping[str, Sequence[dict]]) -> Path:
    """Writes records, each split in one file."""
    folder.mkdir(parents=True)
    for split, found in splits.items():
        array_record.write_shard(folder / array_record.shard_name("tiny", split, 0, 1), FEATURES, found)
    array_record.write_metadata(folder, "tiny", FEATURES, {split: [len(found)] for split, found in splits.items()})
    return folder
