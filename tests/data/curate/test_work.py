"""Curation: the files of a run."""

import json

import pytest

pytest.importorskip("apache_beam")

from tora_jax.data.curate import work
from tora_jax.errors import UserError


def test_files_appear_whole(tmp_path):
    files = work.WorkFiles(str(tmp_path), {"probe": {"a": 1}})
    path = files.path("probe", "key")

    def fail(aside):
        aside.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.write(path, fail)
    assert not work.exists(path)
    work.write_json(path, {"b": (1, 2)})
    assert work.read_json(path) == {"b": [1, 2]}
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["key.json"]
    with pytest.raises(UserError, match="cannot be written"):
        work.write_json(path + "/y.json", 1)


def test_options_name_the_folders():
    """Other options of a stage: other files of it and of those after it, the same of those before."""
    options = {name: {"a": 1} for name in ("probe", "motion", "looks", "captions")}
    before = work.WorkFiles("out", options)
    after = work.WorkFiles("out", {**options, "motion": {"a": 2}})
    other = work.WorkFiles("out", {**options, "probe": {"a": 2}})
    for stage in ("probe", "clips", "motion", "looks", "captions"):
        assert (before.path(stage, "k") == after.path(stage, "k")) == (stage != "motion")
        assert before.path(stage, "k") != other.path(stage, "k")
    assert before.path("content", "k") == other.path("content", "k")


def test_zip_files_are_the_same_for_the_same_content(tmp_path):
    for name in "ab":
        work.write_zip(str(tmp_path / name), iter([("x", b"1"), ("y", b"2")]), lambda: {"n": 2})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with work.open_zip(str(tmp_path / "a")) as archive:
        assert archive.namelist() == ["x", "y", work.META]
        assert json.loads(archive.read(work.META)) == {"n": 2}
