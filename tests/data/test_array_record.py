"""TFDS folders as our own writer makes them, read by TFDS."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tora_jax.data import array_record
from tora_jax.io import files

FEATURES = tfds.features.FeaturesDict({"number": np.int64, "name": tfds.features.Text()})


def test_shards_of_two_splits(tmp_path):
    numbers = {"train": [[1, 2], [], [3]], "validation": [[4]]}
    for split, shards in numbers.items():
        for i, shard in enumerate(shards):
            path = tmp_path / array_record.shard_name("some", split, i, len(shards))
            records = ({"number": number, "name": f"n{number}"} for number in shard)
            assert array_record.write_shard(path, FEATURES, records) == len(shard)
    lengths = {split: list(map(len, shards)) for split, shards in numbers.items()}
    array_record.write_metadata(tmp_path, "some", FEATURES, lengths)
    builder = tfds.builder_from_directory(tmp_path)
    for split, shards in numbers.items():
        assert list(builder.info.splits[split].shard_lengths) == lengths[split]
        found = [(record["number"], record["name"].decode()) for record in builder.as_data_source(split)]
        assert found == [(number, f"n{number}") for shard in shards for number in shard]


def test_the_metadata_of_a_set_in_a_bucket(tmp_path):
    """As beside the shards, which stay as they are."""
    here, bucket = tmp_path / "set", files.path("memory://bucket/set")
    shard = array_record.shard_name("some", "train", 0, 1)
    here.mkdir()
    array_record.write_shard(here / shard, FEATURES, [{"number": 1, "name": "one"}])
    (bucket / shard).send(here / shard)
    for folder in (here, bucket):
        array_record.write_metadata(folder, "some", FEATURES, {"train": [1]})
    assert files.sizes(bucket) == files.sizes(here)


def test_errors_are_told_apart(tmp_path):
    """A file that cannot be written is an OSError; what goes wrong in the records is raised as it is."""

    def broken():
        yield {"number": 1, "name": "one"}
        raise RuntimeError("of the records")

    with pytest.raises(RuntimeError, match="of the records"):
        array_record.write_shard(tmp_path / "a", FEATURES, broken())
    with pytest.raises(OSError, match="no_folder"):
        array_record.write_shard(tmp_path / "no_folder" / "a", FEATURES, iter(()))
