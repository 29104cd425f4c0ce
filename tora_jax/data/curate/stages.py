"""The stages as Beam transforms, and the whole pipeline.

Between stages travel only names, scores and reasons; videos, clips and tracks lie in the stages' files. So memory does
not grow with the data, and what a file is there for is not done again.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import apache_beam as beam
import cv2
import numpy as np
from apache_beam.io import fileio
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.transforms.environments import SubprocessSDKEnvironment

from tora_jax.conditioning import text
from tora_jax.data.curate import camera, captions, cuts, files, looks, probe, report, rules, shards, tracks
from tora_jax.data.curate.files import Work
from tora_jax.data.curate.probe import UnusableError
from tora_jax.data.curate.rules import Row
from tora_jax.errors import UserError
from tora_jax.io.video import VideoInfo

DIGITS = 15  # hexadecimal, of a number that says which clips a data set holds: Beam's integers have 63 bits
# A process of the local runner. Beam's own command for it tells all that it does.
WORKER = """
import logging
logging.disable(logging.WARNING)
from apache_beam.runners.worker import sdk_worker_main
sdk_worker_main.main([])
"""

STAGES = ("probe", "clips", "motion", "looks")


class Source(NamedTuple):
    """A source video: the digest of its content, and where it lies."""

    key: str
    path: str


# ----------------------------------------------------------------------------------------------------------
# Stages: each writes a file for each source video, unless it is there
# ----------------------------------------------------------------------------------------------------------


class Stage(beam.PTransform):
    """Source videos -> the same, once the stage's file of each is there.

    Args:
      name: "probe", "clips", "motion" or "looks"; each needs the files of those before it (but "looks" not those of
        "motion").
    """

    def __init__(self, name: str, work: Work):
        super().__init__(label=name)
        self._name, self._work = name, work

    def expand(self, sources: beam.PCollection) -> beam.PCollection:
        return sources | beam.ParDo(_Fill(self._name, self._work))


class _Fill(beam.DoFn):
    def __init__(self, stage: str, work: Work):
        self._stage, self._work = stage, work

    def setup(self) -> None:
        cv2.setNumThreads(1)  # there is a process for each core
        make = {"probe": _probe, "clips": _clips, "motion": _motion, "looks": _looks}[self._stage]
        self._fill = make(self._work)

    def process(self, source: Source) -> Iterator[Source]:
        path = self._work.path(self._stage, source.key)
        if not files.exists(path):
            self._fill(source, path)
        yield source


Fill = Callable[[Source, str], None]
Written = tuple[str, int, np.ndarray]  # a shard: its split, its number, and `VideoInfo` of its clips


def _probe(work: Work) -> Fill:
    options = work.options["probe"]

    def fill(source: Source, path: str) -> None:
        found: dict[str, Any] = {"reason": ""}
        try:
            with files.local(source.path) as here:
                video, look = probe.probe(here, options["damaged_share"], options["threshold"])
            pieces = cuts.plan(video, look, *(options[name] for name in ("shortest", "longest", "loss")))
            found |= {"video": dataclasses.asdict(video), "pieces": [dataclasses.asdict(piece) for piece in pieces]}
            starts = look.ticks[[0, *look.cuts]]
            used = {int(np.searchsorted(starts, piece.start, "right")) for piece in pieces}
            found |= {"scenes": len(starts), "short scenes": len(starts) - len(used)}
            if not pieces:
                raise UnusableError("too short")
        except UnusableError as error:
            found["reason"] = str(error)
        files.write_json(path, found)

    return fill


def _clips(work: Work) -> Fill:
    def fill(source: Source, path: str) -> None:
        found, damaged = files.read_json(work.path("probe", source.key)), []
        video = probe.Video(**{**found["video"], "traits": tuple(found["video"]["traits"])})

        def members() -> Iterator[tuple[str, bytes]]:
            for i, piece in enumerate(found["pieces"]):
                try:
                    yield f"{i:05d}.mp4", cuts.cut(here, video, cuts.Piece(**piece))
                except UnusableError:
                    damaged.append(i)

        with files.local(source.path) as here:
            files.write_zip(path, members(), lambda: {"damaged": damaged})

    return fill


def read_clip(work: Work, key: str, index: int) -> bytes:
    """The mp4 of a clip."""
    with files.open_zip(work.path("clips", key)) as archive:
        return archive.read(f"{index:05d}.mp4")


def _each_clip(work: Work, source: Source) -> Iterator[tuple[int, bytes]]:
    with files.open_zip(work.path("clips", source.key)) as archive:
        for name in archive.namelist():
            if name != files.META:
                yield int(name.partition(".")[0]), archive.read(name)


def clip_name(key: str, index: int) -> str:
    return f"{key[:16]}-{index:05d}"


def measure(
    clip: bytes, flow: camera.Flow, options: Mapping[str, Any], rng: np.random.Generator
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Size, motion scores and tracks of a clip.

    Args:
      options: with all of
        short: pixels of the shorter side, that flow is found at. fps: frames a second, that it is found between.
        static: see `camera.analyse`. track_seconds, tracks: see `tracks.inside_objects`.

    Raises:
      UnusableError: "damaged".
    """

    def sampled(count: int, rate: float) -> np.ndarray:
        wanted = min(max(round((count - 1) * options["fps"] / rate) + 1, 2), count)
        return np.round(np.linspace(0, count - 1, wanted)).astype(int)

    video, info = looks.read_frames(clip, sampled, options["short"])
    at = sampled(info.frames, info.fps)
    seconds = (info.frames - 1) / info.fps / max(len(at) - 1, 1)
    forward = flow(video)
    found = camera.analyse(video, forward, seconds, options["static"])
    paths, seen = np.zeros((0, len(at), 2), np.float32), np.zeros((0, len(at)), bool)
    if found.masks.any():
        backward = flow(video[::-1])[::-1]
        starts = max(round(options["track_seconds"] / seconds), 1)
        paths, seen = tracks.inside_objects(rng, video, forward, backward, found.masks, starts, options["tracks"])
    paths, seen = tracks.to_all_frames(paths, seen, at)
    scores = {**info._asdict(), "flow": camera.flow_score(forward, seconds)}
    scores |= {field.name: getattr(found, field.name) for field in dataclasses.fields(found) if field.name != "masks"}
    return scores, {"tracks": paths, "visible": seen}


def _motion(work: Work) -> Fill:
    options = work.options["motion"]
    flow = camera.make_flow(options["method"], options["weights"])

    def fill(source: Source, path: str) -> None:
        scores: dict[int, dict[str, Any]] = {}

        def members() -> Iterator[tuple[str, bytes]]:
            for i, clip in _each_clip(work, source):
                rng = np.random.default_rng(int(files.digest(clip_name(source.key, i))[:8], 16))
                try:
                    scores[i], arrays = measure(clip, flow, options, rng)
                except UnusableError:
                    continue
                for name, array in arrays.items():
                    np.save(file := io.BytesIO(), array)
                    yield f"{i:05d}.{name}.npy", file.getvalue()

        files.write_zip(path, members(), lambda: scores)

    return fill


def _looks(work: Work) -> Fill:
    options = work.options["looks"]
    judge = looks.make_judge(options["clip"], options["head"]) if options["clip"] else None

    def fill(source: Source, path: str) -> None:
        found: dict[int, dict[str, Any]] = {}
        for i, clip in _each_clip(work, source):
            try:
                frames, _ = looks.read_frames(clip, looks.spread, options["short"])
            except UnusableError:
                continue
            score = judge(frames) if judge else None
            found[i] = {"hash": looks.perceptual_hash(frames).hex(), "aesthetic": score}
        files.write_json(path, found)

    return fill


# ----------------------------------------------------------------------------------------------------------
# The whole
# ----------------------------------------------------------------------------------------------------------


def build(pipeline: beam.Pipeline, patterns: Sequence[str], output: str, options: Mapping[str, Mapping[str, Any]]):
    """Puts the whole pipeline together: files that match -> shards, stats.json and report.html in `output`.

    Args:
      patterns: of files; `**` stands for any folders, or none.
      output: a folder.
      options: of each stage, see configs/curate.py.
    """
    work = Work(output, options)
    both = sorted({*patterns, *(pattern.replace("**/", "") for pattern in patterns)})
    found = (
        pipeline
        | "patterns" >> beam.Create(both)
        | "match" >> fileio.MatchAll(fileio.EmptyMatchTreatment.ALLOW)
        | "place" >> beam.Map(lambda file: (file.path, file.size_in_bytes, file.last_updated_in_seconds))
        | "once" >> beam.Distinct()
        | "spread" >> beam.Reshuffle()
        | "content" >> beam.Map(_key, work)
        | "same" >> beam.GroupByKey()
    )
    sources = found | "first" >> beam.Map(lambda same: Source(same[0], min(same[1])))
    probed = sources | Stage("probe", work) | "facts" >> beam.Map(_facts, work)
    done = probed | "usable" >> beam.FlatMap(lambda facts: [] if facts["reason"] else [Source(*facts["source"])])
    for name in STAGES[1:]:
        done = done | Stage(name, work)
    rows = done | "rows" >> beam.FlatMap(_rows, work) | "rules" >> beam.Map(_judge, options["rules"])
    kept = rows | "passed" >> beam.Filter(_passed) | Copies(options["rules"]["copy_bits"])
    captioned = (
        kept
        | "unique" >> beam.Filter(_passed)
        | "calls" >> _batches(options["captions"]["parallel"])
        | "captions" >> beam.ParDo(_Caption(work))
    )
    dropped = rows | "failed" >> beam.Filter(_failed), kept | "copies" >> beam.Filter(_failed)
    everything = (*dropped, captioned) | "all" >> beam.Flatten()
    written = captioned | "good" >> beam.Filter(_passed) | Shards(work)
    numbers = (
        (
            found | "files" >> beam.FlatMap(lambda same: report.count_paths(same[1])),
            probed | "count files" >> beam.FlatMap(report.count_file),
            everything | "count clips" >> beam.FlatMap(report.count_clip),
        )
        | "counts" >> beam.Flatten()
        | "sum" >> beam.CombinePerKey(sum)
    )
    samples = (
        everything
        | "by reason" >> beam.Map(lambda row: (row["reason"] or "kept", row))
        | "some" >> beam.combiners.Top.SmallestPerKey(options["report"]["samples"], key=_draw)
        | "apart" >> beam.FlatMap(lambda group: [(group[0], row) for row in group[1]])
        | "again" >> beam.Reshuffle()
        | "pictures" >> beam.FlatMap(_picture, work)
    )
    return (
        pipeline
        | "end" >> beam.Create([output])
        | "report"
        >> beam.Map(
            _report,
            beam.pvalue.AsList(numbers),
            beam.pvalue.AsList(samples),
            beam.pvalue.AsSingleton(written),
        )
    )


def run(
    patterns: list[str],
    output: str,
    options: Mapping[str, Mapping[str, Any]],
    workers: int = 1,
    beam_flags: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Runs the pipeline.

    Args:
      patterns, output, options: see `build`.
      workers: processes of the local runner.
      beam_flags: of Beam; with a `--runner` among them, that one runs it.

    Returns:
      what stats.json holds.

    Raises:
      UserError: no file matches, an option is wrong, a server cannot be reached, or the disk is full.
    """
    options_of_beam = PipelineOptions(list(beam_flags), direct_num_workers=workers)
    runner = None if any(flag.startswith("--runner") for flag in beam_flags) else _local_runner(workers)
    try:
        with beam.Pipeline(runner, options_of_beam) as pipeline:
            build(pipeline, patterns, output, options)
    except UserError as error:
        raise UserError(_message(str(error))) from error
    except Exception as error:  # from another process it comes as text
        if "UserError: " not in str(error):
            raise
        raise UserError(_message(str(error).rpartition("UserError: ")[2])) from None
    stats = files.read_json(FileSystems.join(output, "stats.json"))
    if not stats["files"]["total"]:
        raise UserError(f"no file matches {', '.join(patterns)}; put quotes around the pattern")
    return stats


def _local_runner(workers: int) -> FnApiRunner:
    if workers == 1:
        return FnApiRunner()
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(WORKER)}"
    return FnApiRunner(SubprocessSDKEnvironment.from_command_string(command))


def _batches(size: int) -> beam.BatchElements:
    return beam.BatchElements(min_batch_size=size, max_batch_size=size)


def _message(text: str) -> str:
    """Without what Beam adds."""
    return re.split(r" \[while running|\n", text.strip())[0]


def _key(file: tuple[str, int, float], work: Work) -> tuple[str, str]:
    """(digest of the content, path); the digest is kept, by the file's size and time."""
    path = work.path("content", files.digest(*map(str, file)))
    if files.exists(path):
        return files.read_json(path), file[0]
    key = files.content_key(file[0])
    files.write_json(path, key)
    return key, file[0]


def _facts(source: Source, work: Work) -> dict[str, Any]:
    return {"source": tuple(source), **files.read_json(work.path("probe", source.key))}


def _rows(source: Source, work: Work) -> Iterator[Row]:
    """What the stages found of each clip, in one dict."""
    found, seen = (files.read_json(work.path(stage, source.key)) for stage in ("probe", "looks"))
    with files.open_zip(work.path("motion", source.key)) as archive:
        motion = json.loads(archive.read(files.META))
    for i, piece in enumerate(found["pieces"]):
        row = {"name": clip_name(source.key, i), "key": source.key, "index": i, "path": source.path}
        row |= {name: piece[name] for name in ("seconds", "copied", "black", "frozen")}
        damaged = str(i) not in motion or str(i) not in seen
        yield {**row, "reason": "damaged"} if damaged else {**row, **motion[str(i)], **seen[str(i)], "reason": ""}


def _judge(row: Row, limits: Mapping[str, Any]) -> Row:
    return {**row, "reason": row["reason"] or rules.reason(row, limits)}


def _passed(row: Row) -> bool:
    return not row["reason"]


def _failed(row: Row) -> bool:
    return bool(row["reason"])


def _draw(row: Row) -> str:
    return files.digest(row["name"])


class Copies(beam.PTransform):
    """Rows of clips -> the same, those marked that look like a better one.

    Args:
      most: bits of the perceptual hash that may differ.
    """

    def __init__(self, most: int):
        super().__init__()
        self._most = most

    def expand(self, rows: beam.PCollection) -> beam.PCollection:
        better = (
            rows
            | "parts" >> beam.FlatMap(_parts, self._most)
            | "alike" >> beam.GroupByKey()
            | "compare" >> beam.FlatMap(_compare, self._most)
        )
        named = rows | "name" >> beam.Map(lambda row: (row["name"], row))
        return {"row": named, "better": better} | "join" >> beam.CoGroupByKey() | "mark" >> beam.Map(_mark)


def _parts(row: Row, most: int) -> Iterator[tuple[tuple[int, bytes], Row]]:
    for band in rules.bands(bytes.fromhex(row["hash"]), most):
        yield band, {name: row[name] for name in ("name", "hash", "height", "width", "seconds")}


def _compare(group: tuple[tuple[int, bytes], Iterable[Row]], most: int) -> Iterator[tuple[str, str]]:
    return rules.copies(list(group[1]), most)


def _mark(joined: tuple[str, Mapping[str, Iterable]]) -> Row:
    (row,), better = list(joined[1]["row"]), sorted(joined[1]["better"])
    return {**row, "reason": "copy", "copy_of": better[0]} if better else row


class _Caption(beam.DoFn):
    """Rows -> the same with `caption`, or with a reason."""

    def __init__(self, work: Work):
        self._work, self._options = work, work.options["captions"]

    def setup(self) -> None:
        names = ("server", "model", "prompt", "retries", "timeout", "tokens")
        self._ask = captions.Captioner(**{name: self._options[name] for name in names})

    def process(self, rows: Sequence[Row]) -> Iterator[Row]:
        with ThreadPoolExecutor(max(len(rows), 1)) as pool:
            for row, caption in zip(rows, pool.map(self._caption, rows), strict=True):
                if not caption:
                    yield {**row, "reason": "no caption"}
                    continue
                if self._options["scores"]:
                    caption = text.append_scores(caption, row["aesthetic"], row["flow"], row["camera"])
                yield {**row, "caption": caption}

    def _caption(self, row: Row) -> str:
        if not self._options["server"]:
            return captions.of_file(row["path"])
        video = read_clip(self._work, row["key"], row["index"])
        path = self._work.path("captions", files.digest(video))
        if files.exists(path):
            return files.read_json(path)
        frames, _ = looks.read_frames(video, looks.spread, self._options["short"])
        caption = self._ask(frames)
        files.write_json(path, caption)
        return caption


class Shards(beam.PTransform):
    """Rows of kept clips -> the name of the folder with the shards, when it is whole."""

    def __init__(self, work: Work):
        super().__init__()
        self._work = work

    def expand(self, rows: beam.PCollection) -> beam.PCollection:
        work, options = self._work, self._work.options["shards"]

        named = rows | "split" >> beam.Map(_split, options["validation"]) | "names" >> beam.GroupByKey()
        ordered = named | "order" >> beam.Map(lambda group: (group[0], np.sort(list(group[1]))))
        content = (
            rows
            | "what" >> beam.Map(lambda row: _number(json.dumps(row, sort_keys=True), json.dumps(options)))
            | "mix" >> beam.CombineGlobally(lambda numbers: sum(numbers) % 16**DIGITS)
        )
        folder = beam.pvalue.AsSingleton(
            content | "folder" >> beam.Map(lambda number: FileSystems.join(work.folder, shards.folder_name(number)))
        )
        written = (
            rows
            | "place" >> beam.Map(_place, options, beam.pvalue.AsDict(ordered))
            | "shards" >> beam.GroupByKey()
            | "write" >> beam.Map(_write, work, folder)
        )
        finished = rows.pipeline | "last" >> beam.Create([work.folder])
        return finished | "finish" >> beam.Map(
            _finish, folder, beam.pvalue.AsList(written), bool(options["validation"])
        )


def _split(row: Row, validation: float) -> tuple[str, str]:
    """(split, name): all clips of a source are in one split."""
    return "validation" if files.chance("split " + row["key"]) < validation else "train", row["name"]


def _place(row: Row, options: Mapping[str, Any], names: Mapping[str, np.ndarray]) -> tuple[tuple[str, int, int], Row]:
    """((split, number of the shard, number of shards), row): the names in order, so many to a shard."""
    split, name = _split(row, options["validation"])
    number = int(np.searchsorted(names[split], name)) // options["clips"]
    return (split, number, math.ceil(len(names[split]) / options["clips"])), row


def _number(*parts: str) -> int:
    return int(files.digest(*parts)[:DIGITS], 16)


def _write(group: tuple[tuple[str, int, int], Iterable[Row]], work: Work, folder: str) -> Written:
    """Writes a shard, unless it is there."""
    (split, number, count), rows = group[0], sorted(group[1], key=lambda row: row["name"])
    path = FileSystems.join(folder, shards.shard_name(split, number, count))
    if not files.exists(path):
        shards.write_shard(path, (_record(row, work) for row in rows))
    return split, number, np.array([[row[name] for name in VideoInfo._fields] for row in rows], float)


def _record(row: Row, work: Work) -> dict[str, Any]:
    with files.open_zip(work.path("motion", row["key"])) as archive:
        arrays = [archive.read(f"{row['index']:05d}.{name}.npy") for name in ("tracks", "visible")]
    paths, seen = (np.load(io.BytesIO(content)) for content in arrays)
    scores = {name: math.nan if row[name] is None else row[name] for name in shards.SCORES}
    return {
        "name": row["name"],
        "source": row["path"],
        "video": read_clip(work, row["key"], row["index"]),
        "fps": row["fps"],
        "caption": row["caption"],
        "tracks": paths,
        "visible": seen,
        "scores": {**scores, "camera": row["camera"]},
    }


def _finish(output: str, folder: str, written: Sequence[Written], validation: bool) -> str:
    by_split: dict[str, list[np.ndarray]] = {"train": [], **({"validation": []} if validation else {})}
    for split, _, infos in sorted(written, key=lambda one: one[:2]):
        by_split[split].append(infos)
    for split, found in by_split.items():
        if not found:  # TFDS wants at least one file of each split
            shards.write_shard(FileSystems.join(folder, shards.shard_name(split, 0, 1)), ())
            found.append(np.zeros((0, len(VideoInfo._fields))))
    shards.finish(folder, by_split)
    shards.remove_others(output, folder)
    return folder


def _picture(sample: tuple[str, Row], work: Work) -> Iterator[tuple[str, Row, bytes]]:
    group, row = sample
    if row["reason"] != "damaged":
        frames, _ = looks.read_frames(read_clip(work, row["key"], row["index"]), looks.spread, report.SHORT)
        yield group, row, report.sheet(frames)


def _report(output: str, numbers: Sequence, samples: Sequence, folder: str) -> str:
    stats = report.stats(numbers, folder)
    page = report.page(stats, samples)
    files.write(FileSystems.join(output, "report.html"), lambda aside: aside.write_text(page, encoding="utf-8"))
    files.write_json(FileSystems.join(output, "stats.json"), stats)
    return output
