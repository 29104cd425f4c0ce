"""Parts of tensors by their byte ranges, with every byte that is read counted."""

import jax.numpy as jnp
import numpy as np
import pytest

from tora_jax.errors import UserError
from tora_jax.io import files, safetensors_io
from tora_jax.io.safetensors_io import Spec


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    shapes = {"rows": (64, 96), "blocks": (4, 32, 48), "number": (), "none": (0, 3), "line": (7,)}
    found = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return found | {"half": rng.normal(size=(16, 8, 8)).astype(jnp.bfloat16), "odd": rng.normal(size=9) > 0}


@pytest.fixture
def file(arrays, tmp_path):
    specs = {name: Spec(array.dtype, array.shape) for name, array in arrays.items()}
    safetensors_io.write(tmp_path / "x.safetensors", specs, arrays.values())
    return tmp_path / "x.safetensors"


@pytest.fixture
def fetched(monkeypatch):
    """(start, size) of what is read of files."""
    found, read = [], files.read_range
    monkeypatch.setattr(files, "read_range", lambda path, *span: found.append(span) or read(path, *span))
    return found


@pytest.mark.parametrize(("gap", "size"), [(0, 1 << 25), (0, 100), (300, 1000), (1 << 20, 1 << 25)])
def test_boxes(arrays, file, fetched, monkeypatch, gap, size):
    """Of drawn boxes each byte is read once, whatever is read together."""
    monkeypatch.setattr(safetensors_io, "GAP", gap)
    monkeypatch.setattr(safetensors_io, "BYTES_OF_REQUEST", size)
    tensors, rng = safetensors_io.read_header(file), np.random.default_rng(1)
    for _ in range(5):
        boxes = {
            name: [tuple(tuple(map(int, np.sort(rng.integers(0, n + 1, 2)))) for n in array.shape) for _ in range(3)]
            for name, array in arrays.items()
        }
        del boxes["line"]
        fetched.clear()
        found = dict(safetensors_io.read_boxes(tensors, boxes))
        assert found.keys() == boxes.keys()
        needed = np.zeros(file.stat().st_size, int)
        for name, parts in found.items():
            held = np.zeros(arrays[name].shape, bool)
            for box, part in zip(boxes[name], parts, strict=True):
                at = tuple(slice(*span) for span in box)
                np.testing.assert_array_equal(part, arrays[name][at], strict=True)
                held[at] = True
            tensor = tensors[name]
            needed[tensor.begin : tensor.begin + tensor.nbytes] = np.repeat(held.ravel(), tensor.dtype.itemsize)
        read = np.zeros_like(needed)
        for start, count in fetched:
            assert count <= size
            read[start : start + count] += 1
        assert read.max() <= 1
        assert (read >= needed).all()
        if gap == 0:
            np.testing.assert_array_equal(read, needed)


def test_a_file_that_gets_shorter(file):
    tensors = safetensors_io.read_header(file)
    with file.open("r+b") as opened:
        opened.truncate(tensors["half"].begin + 5)
    with pytest.raises(UserError, match="truncated while it was read"):
        list(safetensors_io.read_boxes(tensors, {"half": [((0, 16), (0, 8), (0, 8))]}))
