"""Reads pickles of tensors through PyTorch's weights-only loader, and only where the user allows it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tora_jax.errors import UserError
from tora_jax.io import files, safetensors_io

MAGIC = (b"PK\x03\x04", b"\x80")  # torch's zip archive, and the form before it
# Names under which training tools keep the state dict: PyTorch Lightning, DeepSpeed, other scripts.
WRAPPERS = ("state_dict", "module", "model", "model_state_dict")
# And under which they keep its moving average, beside it.
AVERAGES = ("ema", "model_ema", "ema_state_dict", "ema_model", "state_dict_ema", "params_ema")


def is_pickle(path: Path) -> bool:
    """By its first bytes."""
    start = files.read_range(path, 0, 9)
    # A safetensors header of 128 bytes starts with torch's old magic too; its ninth byte tells.
    return start.startswith(MAGIC) and start[8:] != b"{"


def refuse(path: str | Path, allowing_command: str) -> None:
    """Refuses a pickle, and says how to allow it.

    Raises:
      UserError: always.
    """
    raise UserError(
        f"{path}: a pickle, which can run code when it is read; convert a "
        f"safetensors file, or, if you trust this one: {allowing_command}"
    )


class Held(NamedTuple):
    """Tensors of a pickle.

    Attributes:
      tensors: of the state dict, mapped from the file where it is a zip archive.
      wrapper: the name that it stood under, or "".
      other: the name of the model beside a moving average, or the other way round; "" where there is one alone.
    """

    tensors: dict[str, np.ndarray]
    wrapper: str
    other: str


def read(path: Path, take: str = "ema") -> Held:
    """Reads the state dict of a pickle.

    Args:
      take: where it holds a model and its moving average: "ema" or "model".

    Raises:
      UserError: there is no PyTorch, or its loader refuses the file, or it holds something else.
    """
    try:
        import torch  # only here, and only when pickles are allowed: the package does not need it
    except ImportError:
        raise UserError(f"{path}: reading a pickle needs PyTorch: pip install torch") from None
    here = files.local(path)
    try:
        state = torch.load(here, map_location="cpu", weights_only=True, mmap=_is_zip(here))
    except Exception as error:  # torch raises whatever the damage happens to cause
        # Not in torch's words: they recommend to load it unsafely.
        unsafe = "weights_only" in str(error)
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        more = f" ({found[1]})" if found else ""
        why = f"it holds more than tensors{more}, which may be code" if unsafe else str(error).split(". ")[0]
        why = why.splitlines()[0] if why else type(error).__name__
        raise UserError(f"{path}: torch.load(weights_only=True) refuses it: {why}; get it as safetensors") from None
    wrapper = other = ""
    if isinstance(state, dict):
        model, average = (
            next((name for name in names if isinstance(state.get(name), Mapping)), "") for names in (WRAPPERS, AVERAGES)
        )
        wrapper, other = (average, model) if average and (take == "ema" or not model) else (model, average)
        state = state[wrapper] if wrapper else state
    if not isinstance(state, Mapping) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        named = f"; it has the keys {', '.join(map(str, list(state)[:5]))} ..." if isinstance(state, Mapping) else ""
        raise UserError(f"{path}: not a state dict (a mapping of names to tensors){named}")
    # NumPy has no number format of torch's for these: their bits are taken.
    bits = {
        torch.bfloat16: (torch.int16, "BF16"),
        torch.float8_e4m3fn: (torch.uint8, "F8_E4M3"),
        torch.float8_e5m2: (torch.uint8, "F8_E5M2"),
    }

    def array(tensor) -> np.ndarray:
        if tensor.dtype not in bits:
            return tensor.numpy()
        same, name = bits[tensor.dtype]
        return tensor.view(same).numpy().view(safetensors_io.DTYPES[name])

    return Held({key: array(tensor) for key, tensor in state.items()}, wrapper, other)


def _is_zip(path: Path) -> bool:
    return files.read_range(path, 0, 4) == MAGIC[0]
