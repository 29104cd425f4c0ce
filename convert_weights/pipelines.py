"""Finds the checkpoints of a released Tora on CogVideoX in a folder or behind a hub id, by the names of its files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from convert_weights import folders, sources
from convert_weights.tables.tora_cogvideox import SPLIT
from tora_jax.errors import UserError
from tora_jax.io import files

DIFFUSERS = {"tora": "transformer", "vae": "vae", "t5": "text_encoder"}
SAT = {"tora": "mp_rank_00_model_states.pt", "vae": "3d-vae.pt"}
_WEIGHTS = (".safetensors", *folders.PICKLES)


def find(src: str, variant: str | None) -> dict[str, str]:
    """The checkpoints in diffusers' pipeline folder or in the authors' own: "tora", "vae", "t5" and "tokenizer".

    Args:
      src: a folder or a hub id; or the denoiser alone, then only that is found.
      variant: "t2v" or "i2v", where the folder holds both.

    Returns:
      Name -> where it is: a path, or a hub id with what follows it.

    Raises:
      UserError: it holds no denoiser, or several, or is a release folder of ours.
    """
    if files.path(src).is_file():
        return {"tora": src}
    names = sources.listing(src)
    held = {str(PurePosixPath(name).parent) for name in names if name.endswith(_WEIGHTS)}
    if "tora.safetensors" in names:
        raise UserError(f"{src}: converted already; sample.py takes it as --weights, and --reverse converts it back")
    denoisers = [name for name in names if PurePosixPath(name).name == SAT["tora"]]
    if denoisers:
        found = _sat(src, names, denoisers, variant)
    else:
        found = {part: folder for part, folder in DIFFUSERS.items() if folder in held}
        if "tora" not in found:
            if "." in held:  # the denoiser's own folder
                return {"tora": src}
            raise UserError(
                f"{src}: no denoiser inside: neither {DIFFUSERS['tora']}/ with weights, as in a diffusers pipeline, "
                f"nor {SAT['tora']}, as the authors have it"
            )
    tokenizer = [name for name in names if PurePosixPath(name).name in folders.TOKENIZERS]
    if tokenizer:
        found["tokenizer"] = tokenizer[0]
    return {part: _inside(src, path) for part, path in found.items()}


def _sat(src: str, names: Sequence[str], denoisers: Sequence[str], variant: str | None) -> dict[str, str]:
    chosen = [name for name in denoisers if variant in PurePosixPath(name).parts] or denoisers
    if len(chosen) > 1:
        raise UserError(
            f"{src}: holds {len(chosen)} denoisers ({', '.join(chosen)}); choose with --variant t2v or --variant i2v, "
            "or name one file as SRC, with --vae and --t5"
        )
    found = {"tora": chosen[0]}
    if vae := [name for name in names if PurePosixPath(name).name == SAT["vae"]]:
        found["vae"] = vae[0]
    beside = {str(PurePosixPath(name).parent) for name in names if PurePosixPath(name).name in folders.TOKENIZERS}
    if text := sorted(beside & {str(PurePosixPath(name).parent) for name in names if name.endswith(_WEIGHTS)}):
        found["t5"] = text[0]
    return found


def find_split(src: str, image: bool) -> dict[str, str]:
    """The files of fusers and extractor that go onto a plain base, in a folder or behind a hub id.

    Args:
      image: take those for images as input ("I2V" in the name) where there are both.

    Returns:
      Prefix of their names in a whole checkpoint -> where the file is.

    Raises:
      UserError: one is missing, or there are several.
    """
    names = sources.listing(src)
    found = {}
    for name, prefix in SPLIT.items():
        files = [file for file in names if PurePosixPath(file).name.startswith(name) and file.endswith(_WEIGHTS)]
        of_images = [file for file in files if re.search("i2v", PurePosixPath(file).name, re.IGNORECASE)]
        chosen = of_images if image and of_images else [file for file in files if file not in of_images] or files
        if len(chosen) != 1:
            many = f"several: {', '.join(chosen)}" if chosen else "none"
            raise UserError(f"{src}: wants one file {name}*.safetensors for this base, there are {many}")
        if bool(of_images) != image and len(files) == 1:
            wanted = "an I2V base" if of_images else "a T2V base"
            raise UserError(
                f"{src}: by its name {chosen[0]} is made for {wanted}, and this base is the other one; take the base "
                "that belongs to it, or rename it"
            )
        found[prefix] = _inside(src, chosen[0])
    return found


def _inside(src: str, path: str) -> str:
    return f"{src.rstrip('/')}/{path}"
