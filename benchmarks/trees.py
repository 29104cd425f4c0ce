"""Two states of the project side by side, and Python in each of them: for benchmarks.same and benchmarks.first_run."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

from tora_jax.errors import UserError

ROOT = Path(__file__).parent.parent


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True).stdout


def commit(revision: str) -> str:
    """The full name of a commit.

    Raises:
      UserError: there is none of that name.
    """
    try:
        return git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}").decode().strip()
    except subprocess.CalledProcessError:
        raise UserError(f"{revision}: is no commit of this repository") from None


def export(revision: str, folder: Path) -> Path:
    """Writes a commit's files."""
    with tarfile.open(fileobj=io.BytesIO(git("archive", revision))) as archive:
        archive.extractall(folder, filter="data")
    return own(folder)


def copy(folder: Path) -> Path:
    """Copies the working tree: what git tracks, or would track."""
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").decode().split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return own(folder)


def own(folder: Path) -> Path:
    """Makes a copy of the project import its own modules, and none of the installed project's."""
    if not (folder / "tora_jax" / "configs").exists():  # lies there in an installed package
        (folder / "tora_jax" / "configs").symlink_to("../configs")
    script = "import tora_jax.configs, convert_weights; print(*tora_jax.configs.__path__, *convert_weights.__path__)"
    found = run(folder, "-c {script}", {"script": script}).split()
    if found != [str(folder / "tora_jax" / "configs"), str(folder / "convert_weights")]:
        raise UserError(f"{folder}: would import {found} in place of its own modules")
    return folder


def run(tree: Path, command: str, values: Mapping[str, str], variables: Mapping[str, str] | None = None) -> str:
    """Runs Python in a tree; returns what it prints.

    Args:
      command: its arguments; {name} in them becomes values[name].
      variables: of the environment, beside this process's.

    Raises:
      UserError: it fails; with the last line that it wrote.
    """
    argv = [sys.executable, *(filled(argument, values) for argument in command.split())]
    env = environment(variables or {})
    done = subprocess.run(argv, cwd=tree, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"{command}: exit code {done.returncode}: {last}")
    return done.stdout


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, with a cache for all that is compiled, and these variables."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tora_jax"
    defaults = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    return {**defaults, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **os.environ, **variables}


def filled(text: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text
