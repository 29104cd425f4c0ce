"""Kept clips as a TFDS folder in ArrayRecord, for `data.sources` and `tfds.builder_from_directory`."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float

from tora_jax.data import array_record
from tora_jax.data.array_record import shard_name
from tora_jax.data.curate import work
from tora_jax.data.curate.filters import ClipFacts
from tora_jax.data.curate.work import WorkFiles
from tora_jax.data.sources import sizes_name
from tora_jax.io import files
from tora_jax.io.video import VideoInfo

Written = tuple[str, int, np.ndarray]  # a shard: its split, its number, and `VideoInfo` of its clips

NAME = "clips"
DONE = "dataset_info.json"  # is written last
DIGITS = 15  # hexadecimal, of a number that says which clips a data set holds: Beam's integers have 63 bits
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
    """The name of the folder for these clips; other clips have another."""
    return f"{NAME}-{content % 16**8:08x}"


class Shards(beam.PTransform):
    """Kept clips -> the name of the folder with the shards, when it is whole."""

    def __init__(self, files: WorkFiles):
        super().__init__()
        self._files = files

    def expand(self, clips: beam.PCollection) -> beam.PCollection:
        files, options = self._files, self._files.options["shards"]

        named = clips | "split" >> beam.Map(_split, options["validation"]) | "names" >> beam.GroupByKey()
        ordered = named | "order" >> beam.Map(lambda group: (group[0], np.sort(list(group[1]))))
        content = (
            clips
            | "what" >> beam.Map(lambda clip: _number(json.dumps(clip, sort_keys=True), json.dumps(options)))
            | "mix" >> beam.CombineGlobally(lambda numbers: sum(numbers) % 16**DIGITS)
        )
        folder = beam.pvalue.AsSingleton(
            content | "folder" >> beam.Map(lambda number: work.join(files.folder, folder_name(number)))
        )
        written = (
            clips
            | "place" >> beam.Map(_place, options, beam.pvalue.AsDict(ordered))
            | "shards" >> beam.GroupByKey()
            | "write" >> beam.Map(_write, files, folder)
        )
        finished = clips.pipeline | "last" >> beam.Create([files.folder])
        return finished | "finish" >> beam.Map(
            _finish, folder, beam.pvalue.AsList(written), bool(options["validation"])
        )


def _split(clip: ClipFacts, validation: float) -> tuple[str, str]:
    """(split, name): all clips of a source are in one split."""
    return "validation" if work.chance("split " + clip["key"]) < validation else "train", clip["name"]


def _place(
    clip: ClipFacts, options: Mapping[str, Any], names: Mapping[str, np.ndarray]
) -> tuple[tuple[str, int, int], ClipFacts]:
    """((split, number of the shard, number of shards), clip): the names in order, so many to a shard."""
    split, name = _split(clip, options["validation"])
    number = int(np.searchsorted(names[split], name)) // options["clips"]
    return (split, number, math.ceil(len(names[split]) / options["clips"])), clip


def _number(*parts: str) -> int:
    return int(work.digest(*parts)[:DIGITS], 16)


def _write(group: tuple[tuple[str, int, int], Iterable[ClipFacts]], files: WorkFiles, folder: str) -> Written:
    """Writes a shard, unless it is there."""
    (split, number, count), clips = group[0], sorted(group[1], key=lambda clip: clip["name"])
    path = work.join(folder, shard_name(NAME, split, number, count))
    if not work.exists(path):
        _write_shard(path, (_record(clip, files) for clip in clips))
    return split, number, np.array([[clip[name] for name in VideoInfo._fields] for clip in clips], float)


def _record(clip: ClipFacts, files: WorkFiles) -> dict[str, Any]:
    with work.open_zip(files.path("motion", clip["key"])) as archive:
        arrays = [archive.read(f"{clip['index']:05d}.{name}.npy") for name in ("tracks", "visible")]
    paths, seen = (np.load(io.BytesIO(content)) for content in arrays)
    scores = {name: math.nan if clip[name] is None else clip[name] for name in SCORES}
    return {
        "name": clip["name"],
        "source": clip["path"],
        "video": work.read_clip(files, clip["key"], clip["index"]),
        "fps": clip["fps"],
        "caption": clip["caption"],
        "tracks": paths,
        "visible": seen,
        "scores": {**scores, "camera": clip["camera"]},
    }


def _finish(output: str, folder: str, written: Sequence[Written], validation: bool) -> str:
    by_split: dict[str, list[np.ndarray]] = {"train": [], **({"validation": []} if validation else {})}
    for split, _, infos in sorted(written, key=lambda one: one[:2]):
        by_split[split].append(infos)
    for split, found in by_split.items():
        if not found:  # TFDS wants at least one file of each split
            _write_shard(work.join(folder, shard_name(NAME, split, 0, 1)), ())
            found.append(np.zeros((0, len(VideoInfo._fields))))
    _write_metadata(folder, by_split)
    remove_others(output, folder)
    return folder


def _write_shard(path: str, records: Iterable[Mapping[str, Any]]) -> None:
    work.write(path, lambda aside: array_record.write_shard(aside, FEATURES, records))


def _write_metadata(folder: str, infos: Mapping[str, Sequence[Float[np.ndarray, "_ 4"]]]) -> None:
    """Writes what TFDS reads of the shards, and for `data.sources` the sizes of their clips.

    Args:
      infos: `VideoInfo` of the clips of each shard, by split.
    """
    with work.local_folder() as here:
        for split, of_shards in infos.items():
            np.save(here / sizes_name(split), np.concatenate(of_shards))
            for number in range(len(of_shards)):  # TFDS looks for their names
                (here / shard_name(NAME, split, number, len(of_shards))).touch()
        lengths = {split: [len(clips) for clips in of_shards] for split, of_shards in infos.items()}
        array_record.write_metadata(here, NAME, FEATURES, lengths)
        told = [file for file in here.iterdir() if file.suffix in (".json", ".npy")]
        for file in sorted(told, key=lambda file: file.name == DONE):
            path = work.join(folder, file.name)
            work.write(path, lambda aside, file=file: aside.write_bytes(file.read_bytes()))


def remove_others(output: str, folder: str) -> None:
    """Removes the shards of earlier runs, with other clips, from a run's output."""
    for other in sorted(files.path(output).glob(f"{NAME}-*")):
        if re.fullmatch(rf"{NAME}-[0-9a-f]{{8}}", other.name) and other != files.path(folder):
            files.remove(other)
