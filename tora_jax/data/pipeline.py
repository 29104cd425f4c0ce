"""The input pipeline: sources -> clips of a bucket's size -> motion maps, tokens, frame masks -> batches.

Batch k is a function of the seed and k alone. The number of processes, the number of worker processes and the batches
drawn before do not matter. So the state of an iterator is k, and a run that goes on from k gets the same batches.

A batch is a dict of arrays, with the samples on the leading axis:
  video         uint8 [b, t, h, w, 3]
  maps          uint8 [b, t, h, w, 3]: motion maps, if motion is wanted
  object_mask   bool [b, t, h, w], True = object, if these are wanted, see `object_masks`
  fps, height, width   float32 [b]
  frame_mask    bool [b, t4], over latent frames, True = generate
  ids           int32 [b, n], and text_mask, bool [b, n]: tokens of the caption, if there is a tokenizer
A batch of a precomputed set holds normalised posteriors in place of video and maps, and may hold embeddings of the
captions in place of tokens:
  latent_mean, latent_std   float16 [b, t4, h8, w8, c]
  motion_mean, motion_std   float16 [b, t4, h8, w8, c], one of the stored variants
  text          float16 [b, n, c]
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from tora_jax.conditioning import text
from tora_jax.data import buckets, inventory, sources
from tora_jax.data.clips import DAMAGED, Clip, Clips, size_name, uses_table
from tora_jax.errors import UserError

Batch = dict[str, Any]


def batches(
    config: Mapping[str, Any],
    split: str,
    *,
    seed: int,
    latent_frames: Callable[[int], int],
    tokenizer: text.Tokenizer | None = None,
    training: bool = True,
    shard: tuple[int, int] | None = None,
) -> Batches:
    """Batches of a split: without end in training, else once in order, without the clips that fill no batch.

    Args:
      config: plain mapping with all of
        sources: folders, tables or tars, see `sources.open_source`; records are drawn from all of them alike.
        buckets: dicts of `frames`, `height`, `width`, `fps` (clips are thinned out to about this rate; 0 = as they
          are), `batch` (over all processes) and `weight` (the share of batches). A bucket takes all clips that
          are long and large enough for it; of precomputed sets, those of its size. Or Open-Sora's table: all buckets
          have `resolution` and `share` (the probabilities of `Buckets`) and the same `fps`. Then each clip goes into
          one bucket, of its own aspect ratio, as `Buckets` draws it; the numbers of clips share out the batches; and
          `height`, `width` and `weight` are not used.
        motion: "none", "dense", "sparse" or "mixed". tracks: "given" or "flow". max_tracks: of sparse motion.
        crop: pixels a side of a random square of each clip; 0 = the whole.
        object_masks: whether batches say where objects are, and squares lie around objects where there are any.
        frame_masks: shares of the masks by name, see `frame_masks`.
        workers: worker processes; 0 = a thread. prefetch: batches that are made ahead (by each worker).
        damaged_share: share of the records; when more are damaged, the iterator stops.
      split: "train", "validation" ...
      seed: of the order, and of all draws.
      latent_frames: frames -> latent frames, of the VAE.
      tokenizer: for the captions; None = no captions.
      training: shuffled, without end; else in order, once, with the first frames and the middle of each clip.
      shard: (index, count) of this process among those that read different clips, see `placement.shard_of`; None =
        JAX's.

    Returns:
      an iterator over this process's part of each batch.

    Raises:
      UserError: a source is missing or empty, a bucket is larger than any clip, the number of processes does not
        divide a batch, or an option is none of those above.
    """
    index, count = (jax.process_index(), jax.process_count()) if shard is None else shard
    buckets.check(config["buckets"])
    for bucket in config["buckets"]:
        if bucket["batch"] % count:
            raise UserError(f"bucket {size_name(bucket)}: {count} processes do not divide a batch of {bucket['batch']}")
    clips, parts, filled = Clips(config, split), [], []
    for bucket, fitting in clips.fill_buckets(seed):
        load = clips.loader(bucket, tokenizer, training, latent_frames(bucket["frames"]), fitting=fitting)
        filled.append((bucket, load.fitting))
        numbers = grain.MapDataset.source(load.fitting)
        if training:
            numbers = numbers.shuffle(seed=seed).repeat()
        # Batches of one process, of which each process takes every count-th: the samples of batch k are the same
        # for any number of processes.
        loaded = numbers.random_map(load, seed=seed)
        local = loaded.batch(bucket["batch"] // count, drop_remainder=True, batch_fn=_stack)
        parts.append(local[: len(numbers) // bucket["batch"] * count][index::count])
    if not training and uses_table(config):
        parts = list(filter(len, parts))
    if not parts or not all(map(len, parts)):
        raise UserError(f"split {split!r} has too few clips for a batch of each bucket; make the batches smaller")
    weights = [bucket["weight"] for bucket, _ in filled]
    joined = grain.MapDataset.mix(parts, weights) if training else grain.MapDataset.concatenate(parts)
    table = functools.partial(inventory.table, clips, filled, tokenizer)
    return Batches(joined, config["workers"], config["prefetch"], clips, config["damaged_share"], table)


def _stack(clips: Sequence[Clip]) -> Batch:
    batch = {name: np.stack([clip[name] for clip in clips]) for name in clips[0] if name != DAMAGED}
    return {**batch, DAMAGED: tuple(found for clip in clips for found in clip[DAMAGED])}


class Batches(grain.DatasetIterator):
    """Iterates over batches; `close` it at the end. Its state can be saved by Grain's checkpoints, or as JSON.

    Attributes:
      made: what the sources were precomputed with; None of clips.
      damaged: name of each damaged record met so far -> what is wrong with it. Another record, drawn at random, stands
        in for a damaged one, with one warning for each.
      table: the function that gives the `inventory.table`.
    """

    def __init__(
        self,
        dataset: grain.MapDataset,
        workers: int,
        prefetch: int,
        clips: Clips,
        damaged_share: float,
        table: Callable[[], str],
    ):
        super().__init__()
        self._dataset, self._workers, self._prefetch = dataset, workers, prefetch
        self._source, self._records, self._share = clips.source, len(clips.source), damaged_share
        self.made, self.table = clips.source.made, table
        self._next, self._batches = 0, None
        self.damaged: dict[str, str] = {}
        self._note(clips.damaged.items())

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
          UserError: more records are damaged than the config allows.
        """
        self.start_prefetch()
        batch = next(self._batches)
        self._next += 1
        self._note(batch.pop(DAMAGED))
        # Copied out of the worker's shared memory, which is freed with the last array in it.
        return {name: np.array(array) for name, array in batch.items()} if self._workers else batch

    def start_prefetch(self) -> None:
        self._assert_not_closed()
        if self._batches is None:
            self._batches = prefetched(self._dataset[self._next :], self._workers, self._prefetch)
            self._batches.start_prefetch()

    def _note(self, damaged: Iterable[tuple[str, str]]) -> None:
        for name, reason in damaged:
            if name not in self.damaged:
                self.damaged[name] = reason
                warnings.warn(f"{name}: damaged and passed over ({reason})", stacklevel=3)
        if len(self.damaged) > self._share * self._records:
            name, reason = next(iter(self.damaged.items()))
            raise UserError(
                f"{len(self.damaged)} of {self._records} records are damaged, such as {name} ({reason}); "
                f"mend or remove them, or raise damaged_share above {self._share:g}"
            )

    def identity(self) -> dict[str, Any]:
        """What tells these clips apart from others, as JSON can hold it, see `sources.digest`."""
        return {"clips": self._records, "digest": sources.digest(self._source), "made": self.made}

    def get_state(self) -> dict[str, Any]:
        """The number of the next batch, and the damaged records."""
        return {"next": self._next, "damaged": dict(self.damaged)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._stop()
        self._next, self.damaged = int(state["next"]), {**self.damaged, **state["damaged"]}

    def _stop(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def close(self) -> None:
        """Ends threads and worker processes."""
        self._stop()
        super().close()


def prefetched(dataset: grain.MapDataset, workers: int, prefetch: int) -> grain.DatasetIterator:
    """Iterates over a data set whose elements are made ahead of time.

    Args:
      workers: processes that make them; 0 = a thread.
      prefetch: elements that are made ahead, by each worker.
    """
    ahead = 1 if workers else prefetch
    elements = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead))
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain gives the workers a copy of the flags
            flags.FLAGS.mark_as_parsed()
        elements = elements.mp_prefetch(grain.MultiprocessingOptions(workers, prefetch))
    return iter(elements)
