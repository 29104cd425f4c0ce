"""The sprites as a TFDS data set."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from tora_jax.data import sprites
from tora_jax.data.sprites.clips import WORLDS, make_clip
from tora_jax.errors import UserError
from tora_jax.io.video import write_video


@dataclasses.dataclass
class SpritesConfig(tfds.core.BuilderConfig):
    """One set of clips: `side` pixels, `frames`, the seed, how many clips each split has, and one of WORLDS."""

    side: int = 128
    frames: int = 17
    fps: float = 8.0
    seed: int = 0
    clips: Mapping[str, int] = dataclasses.field(default_factory=lambda: WORLDS[1].splits)
    world: int = 1  # "version" is TFDS's own


class Sprites(tfds.core.GeneratorBasedBuilder):
    """The clips as records: the fields of `Clip`, with the video as mp4 bytes."""

    __module__ = sprites.__name__  # stands in dataset_info.json, as in sets that were written before

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES: ClassVar = {
        "1.1.0": "Captions name the objects from left to right.",
        "1.0.0": "First version.",
    }

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description=sprites.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "video": tfds.features.Tensor(shape=(), dtype=np.object_),
                    "fps": tfds.features.Scalar(np.float32),
                    "caption": text(),
                    "tracks": tfds.features.Tensor(shape=(None, None, 2), dtype=np.float32, encoding="zlib"),
                    "visible": tfds.features.Tensor(shape=(None, None), dtype=np.bool_, encoding="zlib"),
                    "labels": tfds.features.Tensor(shape=(None, None, None), dtype=np.uint8, encoding="zlib"),
                    "objects": tfds.features.Sequence(
                        {"shape": text(), "colour": text(), "fill": text(), "size": np.float32}
                    ),
                    "background": text(),
                }
            ),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split, count) for split, count in self.builder_config.clips.items()}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        one = functools.partial(record, split, dataclasses.replace(self.builder_config, clips={}))
        with multiprocessing.get_context("spawn").Pool() as pool:
            yield from pool.imap(one, range(count), chunksize=8)


def record(split: str, config: SpritesConfig, index: int) -> tuple[int, dict[str, Any]]:
    """(index, the record of a clip)."""
    clip = make_clip(index, split, config.seed, config.side, config.frames, config.fps, config.world)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, clip.video, clip.fps)
        video = path.read_bytes()
    return index, {
        "video": video,
        "fps": clip.fps,
        "caption": clip.caption,
        "tracks": clip.tracks,
        "visible": clip.visible,
        "labels": clip.labels,
        "objects": [dataclasses.asdict(sprite) for sprite in clip.sprites],
        "background": clip.background,
    }


def build_sprites(folder: str | Path, config: SpritesConfig | None = None) -> Path:
    """Writes the set under a folder, unless it is there.

    Returns:
      the folder of the version, for `tfds.builder_from_directory` and the `sources` of a training config.

    Raises:
      UserError: the folder cannot be written.
    """
    try:
        builder = Sprites(data_dir=str(folder), config=config or SpritesConfig(name="sprites"))
        builder.download_and_prepare(file_format="array_record")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); choose another folder") from error
    return Path(builder.data_dir)
