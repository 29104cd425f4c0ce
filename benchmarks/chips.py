"""What accelerators can do, by their makers' data sheets: memory in GiB, and TFLOP/s of dense bfloat16 products."""

from typing import NamedTuple


class Chip(NamedTuple):
    memory: float
    peak: float


# By the start of JAX's device_kind, longer ones first.
CHIPS = {
    "TPU v4": Chip(32, 275),
    "TPU v5 lite": Chip(16, 197),
    "TPU v5p": Chip(95, 459),
    "TPU v5": Chip(95, 459),
    "TPU v6 lite": Chip(32, 918),
    "NVIDIA A100-SXM4-40GB": Chip(40, 312),
    "NVIDIA A100": Chip(80, 312),
    "NVIDIA H100": Chip(80, 989),
    "NVIDIA H200": Chip(141, 989),
}


def find(device_kind: str) -> Chip | None:
    """The chip of JAX's `device_kind`; None = another, such as a CPU."""
    return next((chip for name, chip in CHIPS.items() if device_kind.startswith(name)), None)
