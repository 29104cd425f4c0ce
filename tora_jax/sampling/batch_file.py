"""Many videos from one file of JSON lines: grouped by shape, shared out over devices, resumable.

Each line is an object: settings of sampling by name, "trajectories", "conditions" and scores (`request.make`), and a
"name" for the files (without one, the number of the line). Settings that a line leaves out come from the command.

The report NAME.json of a video is written last, so a video with a report is done. The report holds a hash of the line,
the weights and the named files; a video whose hash has changed is made again. A line that fails gets a report with
"error" in place of a video, and the next run tries it again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from tora_jax.backbones.assembly import Models
from tora_jax.errors import UserError
from tora_jax.io import files
from tora_jax.io.files import decode_text, write_atomic
from tora_jax.sampling import request, writer
from tora_jax.sampling.generate import Result

NAME = re.compile(r"[\w][\w.-]{0,99}", re.ASCII)
ASIDE = re.compile(r"\.[0-9a-f]{32}\.(json|mp4)")  # of `write_atomic`
MAX_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Job:
    """A line of the file.

    Attributes:
      line: its number, from 1.
      name: of its files.
      key: hash of the line, with its files and the weights.
      wanted: the request of the line, or its mistake.
    """

    line: int
    name: str
    key: str
    wanted: request.Request | UserError


class Counts(NamedTuple):
    """Numbers of lines: made now, made before, failed now."""

    made: int
    before: int
    failed: int


def read(path: str | Path, folder: Path, section: Any, given: Mapping[str, Any], weights: str = "") -> list[Job]:
    """Reads the lines, without blank ones.

    Args:
      folder: of the videos; this function checks that it can be written.
      section, given: of `request.make`; a line's own settings win.
      weights: `release.checksum` of the weights.

    Raises:
      UserError: the file cannot be read, has no lines, or names a file twice. A mistake in a line stays in its `Job`.
    """
    path = files.path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; --batch takes JSON lines, a video each")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: is over {MAX_BYTES >> 20} MB; cut it into several")
    try:
        lines = decode_text(path.read_bytes(), str(path)).split("\n")  # splitlines also cuts at U+2028 inside a text
    except UserError as error:
        raise UserError(f"{error}; --batch takes JSON lines, a video each") from None
    files.check_writable(folder, f"--out {folder}")
    base = _hash(json.dumps([section, given, weights], sort_keys=True, default=str))
    jobs = [_job(i, line, base, section, given) for i, line in enumerate(lines, 1) if line.strip()]
    if not jobs:
        raise UserError(f"{path}: is empty; write a JSON object a line, such as {{}}")
    taken: dict[str, int] = {}
    for job in jobs:
        for file in writer.paths(video(folder, job)).values():
            if (other := taken.setdefault(file.name.lower(), job.line)) != job.line:
                raise UserError(f"{path}: lines {other} and {job.line} would both write {file.name}; change a name")
    return jobs


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _content(path: Path) -> str:
    if not path.is_file():  # a device has no end
        return ""
    try:
        with files.local(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # reported when the line's turn comes
        return ""


def _job(number: int, line: str, base: str, section: Any, given: Mapping[str, Any]) -> Job:
    name = f"{number:05}"
    key = _hash(base + line.strip())
    try:
        try:
            asked = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"is not valid JSON ({error})") from None
        if not isinstance(asked, dict):
            raise UserError('is no JSON object, such as {"prompt": "a red star."}')
        wish = asked.pop("name", name)
        if not (isinstance(wish, str) and NAME.fullmatch(wish)):
            raise UserError(f"the name {wish!r} is no file name of letters, digits, dots and dashes")
        name = wish
        wanted = request.make(section, {**given, **asked})
        return Job(number, name, _hash(key + "".join(map(_content, wanted.files))), wanted)
    except UserError as error:
        return Job(number, name, key, error)


def run(
    models: Models,
    jobs: list[Job],
    folder: Path,
    per_device: int = 1,
    mesh: Mesh | None = None,
    quiet: bool = False,
    check_interrupt: Callable[[], None] = lambda: None,
) -> Counts:
    """Makes the missing videos; records a failure and goes on with the others.

    Args:
      folder: of the videos, for this run alone; made if missing.
      per_device: videos that each device makes at once.
      mesh: its axis "data" shares out the videos made at once.
      check_interrupt: called after each step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if ASIDE.fullmatch(path.name):  # a kill left it half-written
            path.unlink(missing_ok=True)
    missing = [job for job in jobs if not _is_done(folder, job)]
    before, made, failed = len(jobs) - len(missing), 0, 0
    ready: dict[tuple, list[Job]] = {}
    for job in missing:
        if isinstance(job.wanted, UserError):
            _fail(folder, job, job.wanted)
            failed += 1
        else:
            ready.setdefault(job.wanted.shape, []).append(job)
    size = per_device * (mesh.shape["data"] if mesh else 1)
    total = sum(map(len, ready.values()))
    with tqdm(total=total, desc="videos", unit="video", disable=quiet) as bar:
        for group in ready.values():
            for part in (group[i : i + size] for i in range(0, len(group), size)):
                done = _make(models, part, folder, size, mesh, check_interrupt)
                made, failed = made + done, failed + len(part) - done
                bar.update(len(part))
    counts = Counts(made, before, failed)
    if not quiet:
        print(f"{folder}: {made} videos made, {before} there before, {failed} failed (their .json files say why)")
    return counts


def video(folder: Path, job: Job) -> Path:
    return folder / f"{job.name}.mp4"


def _report(folder: Path, job: Job) -> dict:
    """The report of an earlier run on this job; empty without one, or if it is of another line or of a dry run."""
    try:
        report = json.loads((folder / f"{job.name}.json").read_text())
        return report if report["key"] == job.key else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _is_done(folder: Path, job: Job) -> bool:
    report = _report(folder, job)
    return bool(report) and "error" not in report


def _fail(folder: Path, job: Job, error: Exception) -> None:
    message = " ".join(str(error).split()) or type(error).__name__
    report = {"line": job.line, "key": job.key, "error": message}
    if _report(folder, job) == report:  # as in the run before
        return
    for path in writer.paths(video(folder, job)).values():  # of an older line of this name
        path.unlink(missing_ok=True)
    with write_atomic(folder / f"{job.name}.json") as aside:
        aside.write_text(json.dumps(report, indent=2) + "\n")


def _make(
    models: Models, jobs: list[Job], folder: Path, size: int, mesh: Mesh | None, check_interrupt: Callable[[], None]
) -> int:
    """Makes jobs of one shape together, and records those that fail. Returns the number of videos made."""
    images, able = [], []
    for job in jobs:
        try:
            images.append(job.wanted.read())
            able.append(dataclasses.replace(job, wanted=request.place(models, job.wanted)))
            able[-1].wanted.warn(f"line {job.line}: ")
        except UserError as error:
            _fail(folder, job, error)
    if not able:
        return 0
    # The last job fills up the batch, so that nothing new is compiled.
    filled = [min(i, len(able) - 1) for i in range(size)]
    wanted = [able[i].wanted for i in filled]
    try:
        pieces = request.generate(
            models, wanted, [images[i] for i in filled], mesh=mesh, progress=lambda *_: check_interrupt()
        )
        _write(models, able, folder, pieces)
    except (UserError, MemoryError, jax.errors.JaxRuntimeError) as error:
        smallest = mesh.shape["data"] if mesh else 1
        if len(able) > 1 or size > smallest:  # one of them may be to blame, or so many do not fit into memory
            return sum(_make(models, [job], folder, smallest, mesh, check_interrupt) for job in able)
        _fail(folder, able[0], error)
        return 0
    return len(able)


def _write(models: Models, jobs: list[Job], folder: Path, pieces: Iterator[list[Result]]) -> None:
    with contextlib.ExitStack() as stack:
        writers = []
        for job in jobs:
            report = {
                "line": job.line,
                "key": job.key,
                "settings": job.wanted.settings.report(),
                "lost": job.wanted.lost,
                "weights": models.origin,
            }
            writers.append(stack.enter_context(writer.open_files(video(folder, job), job.wanted.tracks, report)))
        for results in pieces:
            for write, result in zip(writers, results, strict=False):
                write(result)
