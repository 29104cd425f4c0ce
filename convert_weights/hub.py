"""Checkpoints by their hub id: from the local cache, else fetched with `huggingface_hub`, the files needed alone.

An id is "owner/name", and folders and files inside follow it: "stabilityai/sdxl-vae/vae". What the cache holds whole is
taken from it without a question to the hub. HF_HUB_CACHE, HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE count as
for the hub's own client.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert_weights import folders
from tora_jax.errors import UserError

RESUMED = 1 << 20  # bytes; a smaller file is fetched anew where it broke off
_ID = re.compile(r"([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)")
_BESIDE = ("config.json", *folders.TOKENIZERS, *(f"tokenizer/{name}" for name in folders.TOKENIZERS), "tokenizer.json")


def locate(name: str, check: Callable[[str], None] = lambda file: None) -> Path:
    """The file or folder of a hub id, fetched where the cache lacks it. What an earlier try has fetched is kept.

    Args:
      check: is called with each file before it is fetched.

    Raises:
      UserError: it is no hub id, the hub does not give it, or `check` raises.
    """
    repository, inside = _split(name)
    cached = _snapshot(repository)
    if cached is not None and _is_whole(cached / inside):
        return cached / inside
    names = _names(name)
    held = {file.removeprefix(f"{inside}/") for file in names if not inside or file.startswith(f"{inside}/")}
    if not held and inside not in names:
        raise UserError(f"{name}: the hub's {repository} has no {inside}; it holds {', '.join(sorted(names)[:5])} ...")
    if inside in names:
        check(inside)
        return _fetch(name, inside)
    weights, index = folders.choose(name, [file for file in held if "/" not in file])
    if index is not None:
        check(index.removesuffix(".index.json"))
        path = _fetch(name, f"{inside}/{index}")
        weights = sorted(set(folders.read_index(path).values()))
    for file in weights:
        check(file)
    for file in (*sorted(held.intersection(_BESIDE)), *weights):
        path = _fetch(name, f"{inside}/{file}")
    return path.parent


def listing(name: str) -> list[str]:
    """Paths of the files in a repository of the hub, or in a folder inside it; without the hub, of its cached copy.

    Raises:
      UserError: as `locate`.
    """
    repository, inside = _split(name)
    try:
        names = _names(name)
    except UserError:
        if (cached := _snapshot(repository)) is None:
            raise
        names = [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
    start = f"{inside}/" if inside else ""
    return sorted(file.removeprefix(start) for file in names if file.startswith(start))


def _split(name: str) -> tuple[str, str]:
    """The repository of an id, and the path inside."""
    if not (match := _ID.fullmatch(name)) or ".." in name:
        raise UserError(f"{name}: no such file or folder, and no hub id such as hpcai-tech/OpenSora-STDiT-v3")
    return match[1], match[2].strip("/")


def _cache() -> Path:
    """The hub client's folder, by the client's own environment variables."""
    if "HF_HUB_CACHE" in os.environ:
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(os.environ.get("HF_HOME", cache)).expanduser() / "hub"


def _folder(repository: str) -> Path:
    return _cache() / f"models--{repository.replace('/', '--')}"


def _snapshot(repository: str) -> Path | None:
    """The cached copy of a repository: that of its main branch, else the latest."""
    cache = _folder(repository)
    snapshots, main = cache / "snapshots", cache / "refs" / "main"
    if main.is_file() and (snapshots / main.read_text().strip()).is_dir():
        return snapshots / main.read_text().strip()
    found = sorted(snapshots.iterdir(), key=lambda path: path.stat().st_mtime) if snapshots.is_dir() else []
    return found[-1] if found else None


def _is_whole(path: Path) -> bool:
    if not path.is_dir():
        return path.is_file()
    try:
        return bool(folders.weights(path))
    except UserError:
        return False


def _names(name: str) -> list[str]:
    """Paths of all files in the repository."""
    repository, _ = _split(name)
    # Not `list_repo_files`, which tries for half a minute where there is no network.
    return [file.rfilename for file in _ask(name, lambda client: client.model_info(repository)).siblings or ()]


def _fetch(name: str, file: str) -> Path:
    """The cached copy of a file, with a progress bar while it is made."""
    repository, _ = _split(name)
    file = file.lstrip("/")

    def fetch(client) -> str:
        import filelock
        import huggingface_hub
        from huggingface_hub import file_download

        url = huggingface_hub.hf_hub_url(repository, file, endpoint=client.endpoint)
        about = client.get_hf_file_metadata(url=url)
        blob = _folder(repository) / "blobs" / about.etag
        if (about.size or 0) >= RESUMED:
            # The client itself starts such a file again in the next run (huggingface_hub 2.4).
            blob.parent.mkdir(parents=True, exist_ok=True)
            part = blob.with_name(f"{blob.name}.part")
            with filelock.FileLock(f"{part}.lock"):  # another process may fetch it too
                if not blob.exists():
                    with part.open("ab") as stream:
                        options = {"headers": huggingface_hub.utils.build_hf_headers(), "expected_size": about.size}
                        if stream.tell() < about.size:
                            file_download.http_get(url, stream, resume_size=stream.tell(), **options)
                    part.rename(blob)
        return client.hf_hub_download(repository, file, cache_dir=_cache())  # links it, or fetches a small one

    return Path(_ask(name, fetch))


def _ask(name: str, question: Callable[[Any], Any]) -> Any:
    """A question to the hub, its refusals as a `UserError`."""
    repository, _ = _split(name)
    try:
        import huggingface_hub  # only here: the extra `hub`
        from huggingface_hub import errors
    except ImportError:
        raise UserError(
            f"{name}: no such file or folder, and not whole in the hub cache {_cache()}; install the extra hub "
            f"(pip install huggingface_hub), or download it first, for instance with: hf download {repository}"
        ) from None
    try:
        return question(huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT")))
    except errors.GatedRepoError:
        raise UserError(
            f"{name}: the hub wants the terms of {repository} accepted on its page first, then: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{name}: no such file or folder, and the hub has no {repository} (or only after: hf auth login)"
        ) from None
    except Exception as error:  # the client passes on what its network libraries raise
        if isinstance(error, OSError) and error.errno is not None:  # a full disk
            raise
        why = str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{name}: no such file or folder, not whole in the hub cache {_cache()}, and the hub gives no answer "
            f"({why}); start again, what was fetched is kept, or download it elsewhere: hf download {repository}"
        ) from None
