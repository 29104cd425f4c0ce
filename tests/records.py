"""Small data sets for the tests, written as TFDS's ArrayRecord folders without its builders."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from tora_jax.data import sprites

SCALE = sprites.Scale(name="tiny", side=48, frames=9, fps=8.0)
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


def clips(count: int, split: str = "train", scale: sprites.Scale = SCALE) -> list[dict]:
    """Records of drawn clips, as `sprites` writes them."""
    records = (sprites._record(split, scale, index)[1] for index in range(count))
    found = [{name: record[name] for name in FEATURES} for record in records]
    return [{**record, "objects": [{"colour": one["colour"]} for one in record["objects"]]} for record in found]


def write(folder: Path, splits: Mapping[str, Sequence[dict]]) -> Path:
    """Writes records, each split in one file."""
    folder.mkdir(parents=True)
    infos = []
    for split, records in splits.items():
        writer = ArrayRecordWriter(str(folder / f"tiny-{split}.array_record-00000-of-00001"), "group_size:1")
        for record in records:
            writer.write(FEATURES.serialize_example(record))
        writer.close()
        template = tfds.core.ShardedFileTemplate(
            data_dir=epath.Path(folder), dataset_name="tiny", split=split, filetype_suffix="array_record"
        )
        lengths = [len(records)]
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=0, filename_template=template))
    tfds.folder_dataset.write_metadata(
        data_dir=epath.Path(folder), features=FEATURES, split_infos=infos, check_data=False
    )
    return folder
