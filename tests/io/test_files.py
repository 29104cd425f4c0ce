import json

import pytest

from tora_jax.io.files import made_otherwise, note_made, tuples, write_atomic, write_text


def contents(folder):
    return sorted(p.name for p in folder.iterdir())


def test_write_atomic_leaves_all_or_nothing(tmp_path):
    path = tmp_path / "report.json"
    with write_atomic(path) as aside:
        assert aside.parent == tmp_path
        aside.write_text(json.dumps({"a": 1}))
    assert json.loads(path.read_text()) == {"a": 1}
    for fault in (RuntimeError, KeyboardInterrupt):

        def broken(fault=fault):
            with write_atomic(path) as aside:
                aside.write_text("half")
                raise fault

        with pytest.raises(fault):
            broken()
        assert contents(tmp_path) == ["report.json"]
        assert json.loads(path.read_text()) == {"a": 1}


def test_write_atomic_keeps_the_users_file_permissions(tmp_path):
    (tmp_path / "plain").touch()
    with write_atomic(tmp_path / "new") as aside:
        aside.write_text("x")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_text_is_utf8_and_whole(tmp_path):
    write_text(tmp_path / "page.md", "Größe ✓\n")
    assert (tmp_path / "page.md").read_bytes() == "Größe ✓\n".encode()
    assert contents(tmp_path) == ["page.md"]


def test_the_first_setting_that_differs(tmp_path):
    path = tmp_path / "new" / "made.json"
    with pytest.raises(FileNotFoundError):
        made_otherwise(path, {})
    made = {"size": (16, 16), "cell": {"frames": 9, "rules": ((1, 2),)}, "seed": None}
    note_made(path, made)
    assert json.loads(path.read_text()) == {"size": [16, 16], "cell": {"frames": 9, "rules": [[1, 2]]}, "seed": None}
    assert made_otherwise(path, made) is None
    assert made_otherwise(path, {"seed": None}) is None  # the note may hold more
    assert made_otherwise(path, {**made, "seed": 3, "cell": {}}) == ("cell", made["cell"])
    assert made_otherwise(path, {"clips": 5}) == ("clips", None)
    path.write_text("{")
    with pytest.raises(ValueError, match="Expecting"):
        made_otherwise(path, made)


def test_tuples_go_all_the_way_down():
    assert tuples({"a": [1, [2, {"b": [3]}]], "c": (4,), "d": "text"}) == {
        "a": (1, (2, {"b": (3,)})),
        "c": (4,),
        "d": "text",
    }
