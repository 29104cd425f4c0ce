"""The whole of curation as a Beam pipeline: files -> clips -> shards and a report."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.transforms.environments import SubprocessSDKEnvironment

from tora_jax.data.curate import appearance, filters, report, work
from tora_jax.data.curate.captions import AddCaptions
from tora_jax.data.curate.filters import ClipFacts, Copies
from tora_jax.data.curate.shards import Shards
from tora_jax.data.curate.stages import STAGES, SourceVideo, Stage
from tora_jax.data.curate.work import WorkFiles
from tora_jax.errors import UserError
from tora_jax.io.files import is_hidden

# The program of a local worker process. Beam's own logs every step.
WORKER = """
import logging
logging.disable(logging.WARNING)
from apache_beam.runners.worker import sdk_worker_main
sdk_worker_main.main([])
"""


def build(pipeline: beam.Pipeline, patterns: Sequence[str], output: str, options: Mapping[str, Mapping[str, Any]]):
    """Builds the whole pipeline: files that match -> shards, stats.json and report.html in `output`.

    Args:
      patterns: of files; `**` stands for any folders, or none.
      output: a folder.
      options: of each stage, see configs/curate.py.
    """
    files = WorkFiles(output, options)
    both = sorted({*patterns, *(pattern.replace("**/", "") for pattern in patterns)})
    found = (
        pipeline
        | "patterns" >> beam.Create(both)
        | "match" >> beam.FlatMap(work.match)
        | "shown" >> beam.Filter(lambda file: not is_hidden(file.path))
        | "place" >> beam.Map(tuple)
        | "once" >> beam.Distinct()
        | "spread" >> beam.Reshuffle()
        | "content" >> beam.Map(_key, files)
        | "same" >> beam.GroupByKey()
    )
    sources = found | "first" >> beam.Map(lambda same: SourceVideo(same[0], min(same[1])))
    probed = sources | Stage("probe", files) | "facts" >> beam.Map(_facts, files)
    done = probed | "usable" >> beam.FlatMap(lambda facts: [] if facts["reason"] else [SourceVideo(*facts["source"])])
    for name in STAGES[1:]:
        done = done | Stage(name, files)
    clips = done | "rows" >> beam.FlatMap(_clips, files) | "rules" >> beam.Map(_judge, options["rules"])
    kept = clips | "passed" >> beam.Filter(_passed) | Copies(options["rules"]["copy_bits"])
    captioned = (
        kept
        | "unique" >> beam.Filter(_passed)
        | "calls" >> _batches(options["captions"]["parallel"])
        | "captions" >> beam.ParDo(AddCaptions(files))
    )
    dropped = clips | "failed" >> beam.Filter(_failed), kept | "copies" >> beam.Filter(_failed)
    everything = (*dropped, captioned) | "all" >> beam.Flatten()
    written = captioned | "good" >> beam.Filter(_passed) | Shards(files)
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
        | "by reason" >> beam.Map(lambda clip: (clip["reason"] or "kept", clip))
        | "some" >> beam.combiners.Top.SmallestPerKey(options["report"]["samples"], key=_draw)
        | "apart" >> beam.FlatMap(lambda group: [(group[0], clip) for clip in group[1]])
        | "again" >> beam.Reshuffle()
        | "pictures" >> beam.FlatMap(_picture, files)
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
      the content of stats.json.

    Raises:
      UserError: no file matches, an option is wrong, a server cannot be reached, or the disk is full.
    """
    options_of_beam = PipelineOptions(list(beam_flags), direct_num_filesers=workers)
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
    stats = work.read_json(work.join(output, "stats.json"))
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
    """A message without Beam's additions."""
    return re.split(r" \[while running|\n", text.strip())[0]


def _key(file: tuple[str, int, float], files: WorkFiles) -> tuple[str, str]:
    """(digest of the content, path); the digest is kept, by the file's size and time."""
    path = files.path("content", work.digest(*map(str, file)))
    if work.exists(path):
        return work.read_json(path), file[0]
    key = work.content_key(file[0])
    work.write_json(path, key)
    return key, file[0]


def _facts(source: SourceVideo, files: WorkFiles) -> dict[str, Any]:
    return {"source": tuple(source), **work.read_json(files.path("probe", source.key))}


def _clips(source: SourceVideo, files: WorkFiles) -> Iterator[ClipFacts]:
    """All that the stages found of each clip."""
    found, seen = (work.read_json(files.path(stage, source.key)) for stage in ("probe", "looks"))
    with work.open_zip(files.path("motion", source.key)) as archive:
        motion = json.loads(archive.read(work.META))
    for i, piece in enumerate(found["pieces"]):
        clip = {"name": work.clip_name(source.key, i), "key": source.key, "index": i, "path": source.path}
        clip |= {name: piece[name] for name in ("seconds", "copied", "black", "frozen")}
        damaged = str(i) not in motion or str(i) not in seen
        yield {**clip, "reason": "damaged"} if damaged else {**clip, **motion[str(i)], **seen[str(i)], "reason": ""}


def _judge(clip: ClipFacts, limits: Mapping[str, Any]) -> ClipFacts:
    return {**clip, "reason": clip["reason"] or filters.reason(clip, limits)}


def _passed(clip: ClipFacts) -> bool:
    return not clip["reason"]


def _failed(clip: ClipFacts) -> bool:
    return bool(clip["reason"])


def _draw(clip: ClipFacts) -> str:
    return work.digest(clip["name"])


def _picture(sample: tuple[str, ClipFacts], files: WorkFiles) -> Iterator[tuple[str, ClipFacts, bytes]]:
    group, clip = sample
    if clip["reason"] != "damaged":
        video = work.read_clip(files, clip["key"], clip["index"])
        frames, _ = appearance.read_frames(video, appearance.spread, report.SHORT)
        yield group, clip, report.sheet(frames)


def _report(output: str, numbers: Sequence, samples: Sequence, folder: str) -> str:
    stats = report.stats(numbers, folder)
    page = report.page(stats, samples)
    work.write(work.join(output, "report.html"), lambda aside: aside.write_text(page, encoding="utf-8"))
    work.write_json(work.join(output, "stats.json"), stats)
    return output
