"""Files that appear whole or not at all, and notes of the settings behind a folder."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tora_jax.errors import UserError


@contextlib.contextmanager
def write_atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and puts it in place of `path` when the block ends well.

    A fault inside the block, Ctrl-C too, leaves neither a half-written `path` nor the temporary file; an older `path`
    stays as it was.

    Raises:
      UserError: the folder is missing or not writable, the disk is full, or `path` is a folder.
    """
    path = Path(path)
    aside = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        if not path.parent.is_dir():
            raise FileNotFoundError(None, f"there is no folder {path.parent}")
        aside.touch(exist_ok=False)
        yield aside
        os.replace(aside, path)
    except OSError as e:
        reason = e.strerror or e
        raise UserError(f"{path}: cannot be written ({reason}); choose another output path") from e
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def is_hidden(path: str | os.PathLike) -> bool:
    """Whether a file's name begins with a dot: what systems and editors leave beside files, such as macOS's ._NAME."""
    return os.path.basename(path).startswith(".")


# By their marks; UTF-32's begins as UTF-16's does.
ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}


def decode_text(content: bytes, name: str) -> str:
    """Text of a file: UTF-8, or what its byte-order mark says; the mark is no part of it.

    Args:
      name: of the file, for messages.

    Raises:
      UserError: it is in another encoding. Which one, nothing in such a file tells.
    """
    encoding = next((encoding for mark, encoding in ENCODINGS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:  # refused below, as is UTF-16 without its mark
        text = "\0"
    if "\0" in text:
        raise UserError(f"{name}: is no UTF-8 text; convert it (iconv -f latin1 -t utf-8, from Latin-1)")
    return text


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file in UTF-8, as `write_atomic` does.

    Raises:
      UserError: as `write_atomic`.
    """
    with write_atomic(path) as aside:
        aside.write_text(text, encoding="utf-8")


def note_made(path: str | os.PathLike, made: Mapping[str, Any]) -> None:
    """Notes the settings behind the content of a folder, in a file of that folder; makes the folder.

    Args:
      made: name -> value, of JSON's types.

    Raises:
      UserError: as `write_atomic`.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(made, indent=2) + "\n")


def made_otherwise(path: str | os.PathLike, made: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Compares settings with those of a `note_made`.

    Args:
      made: with tuples in place of lists, as `tuples` gives them.

    Returns:
      (name, value in the note) of the first setting that differs, the value None if the note has none; None if all are
      equal. Settings that the note alone has do not count.

    Raises:
      FileNotFoundError: the note is missing.
      ValueError: the note is not valid JSON.
    """
    before = tuples(json.loads(Path(path).read_text(encoding="utf-8")))
    return next(((name, before.get(name)) for name in made if made[name] != before.get(name)), None)


def tuples(value: Any) -> Any:
    """Turns JSON's lists into tuples: fields of Linen modules must be hashable."""
    if isinstance(value, Mapping):
        return {k: tuples(v) for k, v in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value
