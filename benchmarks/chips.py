"""What accelerators can do: memory in GiB, and TFLOP/s of dense bfloat16 products, of what JAX calls a device."""

from typing import NamedTuple


class Chip(NamedTuple):
    memory: float
    peak: float


# By the start of JAX's device_kind, longer ones first. Memory of TPUs is what their compiler lets a program have, which
# is what its message names when a program wants more; peaks, and all of GPUs, are from the makers' data sheets. A chip
# of v4 or of TPU7x is two devices for the compiler, with half of the chip's memory and peak each.
CHIPS = {
    "TPU v4": Chip(15.25, 275 / 2),
    "TPU v5 lite": Chip(15.75, 197),
    "TPU v5p": Chip(95.74, 459),
    "TPU v5": Chip(95.74, 459),
    "TPU v6 lite": Chip(31.25, 918),
    "TPU7x": Chip(94.74, 2307 / 2),
    "NVIDIA A100-SXM4-40GB": Chip(40, 312),
    "NVIDIA A100": Chip(80, 312),
    "NVIDIA H100": Chip(80, 989),
    "NVIDIA H200": Chip(141, 989),
}


def find(device_kind: str) -> Chip | None:
    """The chip of JAX's `device_kind`; None = another, such as a CPU."""
    return next((chip for name, chip in CHIPS.items() if device_kind.startswith(name)), None)
