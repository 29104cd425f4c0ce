"""The notebook runs from top to bottom on the small model's weights."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "tora.ipynb"


def run(source: str, names: dict) -> object:
    """Executes a cell; the value of its last line, if that is an expression."""
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(NOTEBOOK), "exec"), names)
    return eval(compile(last, str(NOTEBOOK), "eval"), names) if last else None


def test_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    names = {}
    # Fewer steps: what a sampler makes of ten is tested elsewhere.
    sources = ["".join(cell["source"]).replace("steps=10", "steps=2") for cell in cells if cell["cell_type"] == "code"]
    shown = [run(source, names) for source in sources]
    assert shown[0] == ((17, 128, 128, 3), (17, 128, 128, 3))
    assert shown[1].size == (5 * 128, 2 * 128)
    assert shown[4] == 29
    assert np.std(names["rests"].video) > 1
    assert "PSNR of the first frame" in capsys.readouterr().out
    assert (tmp_path / "infinity.mp4").stat().st_size > 1000


@pytest.mark.parametrize("field", ["outputs", "execution_count"])
def test_it_is_stored_without_results(field):
    assert not any(cell.get(field) for cell in json.loads(NOTEBOOK.read_text())["cells"])
