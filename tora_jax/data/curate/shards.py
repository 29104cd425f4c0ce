"""Kept clips as a TFDS folder in ArrayRecord, which `data.sources` and `tfds.builder_from_directory` read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from apache_beam.io.filesystems import FileSystems
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from jaxtyping import Float

from tora_jax.data.curate import files
from tora_jax.data.sources import sizes_name

NAME = "clips"
DONE = "dataset_info.json"  # is written last
SCORES = ("flow", "foreground", "pan", "tilt", "zoom", "roll", "shake", "aesthetic")

FEATURES = tfds.features.FeaturesDict(
    {
        "name": tfds.features.Text(),
        "source": tfds.features.Text(),
        "video": tfds.features.Tensor(shape=(), dtype=np.object_),  # mp4 bytes
        "fps": tfds.features.Scalar(np.float32),
        "caption": tfds.features.Text(),
        "tracks": tfds.features.Tensor(shape=(None, None, 2), dtype=np.float32, encoding="zlib"),
        "visible": tfds.features.Tensor(shape=(None, None), dtype=np.bool_, encoding="zlib"),
        "scores": {
            "camera": tfds.features.Text(),
            **{name: tfds.features.Scalar(np.float32) for name in SCORES},  # aesthetic: NaN where there is none
        },
    }
)


def folder_name(content: int) -> str:
    """Of the shards of these clips; other clips, another name."""
    return f"{NAME}-{content % 16**8:08x}"


def shard_name(split: str, number: int, count: int) -> str:
    return f"{NAME}-{split}.array_record-{number:05d}-of-{count:05d}"


def write_shard(path: str, records: Iterable[Mapping[str, Any]]) -> int:
    """Writes a shard; the number of records."""
    count = 0

    def fill(aside) -> None:
        nonlocal count
        writer = ArrayRecordWriter(str(aside), "group_size:1")
        try:
            for record in records:
                writer.write(FEATURES.serialize_example(record))
                count += 1
            writer.close()
        except RuntimeError as error:
            raise OSError(None, str(error)) from error

    files.write(path, fill)
    return count


def finish(folder: str, infos: Mapping[str, Sequence[Float[np.ndarray, "_ 4"]]]) -> None:
    """Writes what TFDS wants to know of the shards, their lengths, and for `data.sources` the sizes of their clips.

    Args:
      infos: `VideoInfo` of the clips of each shard, by split.
    """
    with files.local_folder() as here:
        splits = []
        for split, shards in infos.items():
            lengths = [len(shard) for shard in shards]
            np.save(here / sizes_name(split), np.concatenate(shards))
            for number in range(len(shards)):  # TFDS looks for their names
                (here / shard_name(split, number, len(shards))).touch()
            template = tfds.core.ShardedFileTemplate(
                data_dir=epath.Path(here), dataset_name=NAME, split=split, filetype_suffix="array_record"
            )
            splits.append(
                tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=0, filename_template=template)
            )
        tfds.folder_dataset.write_metadata(
            data_dir=epath.Path(here), features=FEATURES, split_infos=splits, check_data=False
        )
        told = [file for file in here.iterdir() if file.suffix in (".json", ".npy")]
        for file in sorted(told, key=lambda file: file.name == DONE):
            files.write(
                FileSystems.join(folder, file.name), lambda aside, file=file: aside.write_bytes(file.read_bytes())
            )


def remove_others(output: str, folder: str) -> None:
    """Removes the shards of earlier runs, with other clips, from a run's output."""
    found = FileSystems.match([FileSystems.join(output, f"{NAME}-*", "*")])[0].metadata_list
    others = {re.split(r"[/\\]", file.path)[-2] for file in found} - {re.split(r"[/\\]", folder)[-1]}
    for other in sorted(others):
        if re.fullmatch(rf"{NAME}-[0-9a-f]{{8}}", other):
            FileSystems.delete([FileSystems.join(output, other)])
