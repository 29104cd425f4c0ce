"""Release folders onto meshes: every byte read once, and the same numbers as on one device."""

import functools
import uuid

import jax
import numpy as np
import pytest
from tora_jax.configs import common

from tora_jax import sharding
from tora_jax.checkpoints import release
from tora_jax.io import files, safetensors_io

RULES = tuple(common.training()["rules"].items())


@pytest.fixture
def spans(monkeypatch):
    """Of each file (start, size) of what is read."""
    found, read = {}, files.read_range

    def counted(path, start, size):
        found.setdefault(str(path), []).append((start, size))
        return read(path, start, size)

    monkeypatch.setattr(files, "read_range", counted)
    return found


@pytest.fixture(params=["disk", "bucket"])
def folder(request):
    if request.param == "disk":
        yield release.DEMO
        return
    bucket = files.path(f"memory://{uuid.uuid4().hex}")
    for name in files.sizes(release.DEMO):
        (bucket / name).send(release.DEMO / name)
    yield bucket
    bucket.rmtree()


@pytest.fixture(scope="module")
def whole():
    return release.load(release.DEMO).params


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), got, want)


@pytest.mark.parametrize(("mesh", "gap"), [("fsdp=8", 4096), ("data=2,fsdp=2,tensor=2", safetensors_io.GAP)])
def test_onto_a_mesh(folder, mesh, gap, spans, whole, monkeypatch):
    monkeypatch.setattr(safetensors_io, "GAP", gap)
    place = functools.partial(sharding.param_shardings, mesh=sharding.make_mesh(mesh), rules=RULES)
    params = release.load(folder, place=place).params
    same(params, whole)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == place(params)
    for part in release.PARTS:
        (_, first), (_, header), *parts = spans[str(folder / f"{part}.safetensors")]
        read = sorted(parts)
        assert first == 9
        assert read[0][0] == 8 + header
        ends = [start + size for start, size in read]
        assert all(end <= start for end, (start, _) in zip(ends, read[1:], strict=False))
        assert ends[-1] == (folder / f"{part}.safetensors").stat().st_size
