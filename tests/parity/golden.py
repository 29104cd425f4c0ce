"""Golden data: random weights, inputs and the outputs of the public reference implementations.

Files come from tests/golden/, or from the folder in the environment variable TORA_GOLDEN_DIR: then files of the
same names with other sizes, seeds and frame counts run through the same tests. So a test takes every shape,
count and option from the file.
"""

import dataclasses
import json
import os
import zlib
from pathlib import Path

import numpy as np
from safetensors import safe_open

GOLDEN_DIR = Path(os.environ.get("TORA_GOLDEN_DIR") or Path(__file__).parent.parent / "golden")
KEYS_DIR = Path(__file__).parent.parent / "golden" / "checkpoints"


@dataclasses.dataclass(frozen=True)
class Golden:
    config: dict
    tensors: dict[str, np.ndarray]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """All tensors named `prefix/...`, without the prefix."""
        return {k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(prefix + "/")}

    @property
    def params(self) -> dict[str, np.ndarray]:
        return self.group("params")

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[name]

    def get(self, name: str) -> np.ndarray | None:
        return self.tensors.get(name)


def load(name: str) -> Golden:
    with safe_open(GOLDEN_DIR / f"{name}.safetensors", framework="numpy") as f:
        return Golden(json.loads(f.metadata()["config"]), {k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118, not a dict


def checkpoint_keys(name: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a real, public checkpoint."""
    return {k: tuple(v) for k, v in json.loads((KEYS_DIR / f"{name}_keys.json").read_text()).items()}


def procedural(key: str, shape, seed: int) -> np.ndarray:
    """A weight of the full-size golden files: the rule in their `config`, one seeded generator for each key."""
    w = _generator(key, seed).standard_normal(shape, dtype=np.float32)
    if w.ndim >= 2:
        return w * np.float32(1 / np.sqrt(np.prod(shape[1:])))
    if key.endswith(".weight"):
        return 1 + np.float32(0.1) * w
    return w * np.float32(0.1)


def procedural_input(name: str, shape, seed: int) -> np.ndarray:
    return _generator(name, seed).standard_normal(shape, dtype=np.float32)


def _generator(key: str, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=zlib.crc32(key.encode()) + seed))


def assert_close(got, want, tolerance: float) -> None:
    """Max abs error over max abs value, the measure of the golden tolerances."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, want {want.shape}"
    error = np.abs(got - want).max() / (np.abs(want).max() or 1.0)
    print(f"relative error {error:.1e}, tolerance {tolerance:.0e}")  # shown by pytest -rP
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"
