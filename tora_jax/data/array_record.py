"""TFDS folders in ArrayRecord, written without TensorFlow: shards of records, and the metadata that TFDS reads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from tora_jax.io import files
from tora_jax.io.buckets import BucketPath

DONE = "dataset_info.json"  # of a folder that is whole


def shard_name(name: str, split: str, number: int, count: int) -> str:
    """The file name of a shard.

    Args:
      name: of the data set.
      number: of the shard, from 0, among the `count` of its split.
    """
    return f"{name}-{split}.array_record-{number:05d}-of-{count:05d}"


def write_shard(
    path: str | os.PathLike, features: tfds.features.FeaturesDict, records: Iterable[Mapping[str, Any]]
) -> int:
    """Writes a shard, one record after the other, and returns their number.

    Raises:
      OSError: the file cannot be written.
    """
    count, writer = 0, _call(ArrayRecordWriter, str(path), "group_size:1")
    for record in records:
        _call(writer.write, features.serialize_example(record))
        count += 1
    _call(writer.close)
    return count


def readable(path: str | os.PathLike) -> str:
    """The name by which ArrayRecord's reader opens a file: it reads gs:// itself, and of other buckets copies."""
    source = files.path(path)
    return str(source if isinstance(source, BucketPath) and source.scheme == "gs" else files.local(source))


def _call(step, *args: Any) -> Any:
    """Calls the writer, which tells of a full disk by RuntimeError."""
    try:
        return step(*args)
    except RuntimeError as error:
        raise OSError(None, str(error)) from error


def write_metadata(
    folder: Path, name: str, features: tfds.features.FeaturesDict, lengths: Mapping[str, Sequence[int]]
) -> None:
    """Writes features.json and, last, dataset_info.json beside the shards, which are there.

    Args:
      name: of the data set, with which the names of the shards begin.
      lengths: split -> the number of records in each of its shards.
    """
    if isinstance(folder, BucketPath):
        names = {shard_name(name, split, i, len(of)) for split, of in lengths.items() for i in range(len(of))}
        with tempfile.TemporaryDirectory() as here:
            for shard in names:  # TFDS looks for them
                (Path(here) / shard).touch()
            write_metadata(Path(here), name, features, lengths)
            for file in sorted(files.sizes(here).keys() - names, key=lambda file: (file == DONE, file)):
                (folder / file).send(Path(here) / file)
        return
    splits = []
    for split, of_shards in lengths.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=epath.Path(folder), dataset_name=name, split=split, filetype_suffix="array_record"
        )
        splits.append(
            tfds.core.SplitInfo(name=split, shard_lengths=list(of_shards), num_bytes=0, filename_template=template)
        )
    tfds.folder_dataset.write_metadata(
        data_dir=epath.Path(folder), features=features, split_infos=splits, check_data=False
    )
