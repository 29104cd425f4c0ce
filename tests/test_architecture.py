"""Who may import whom: the table in docs/architecture.md, held by reading the imports."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
# Module -> what of ours it may import, beside `errors`: the rows of the table. "models" stands for any model.
ALLOWED = {
    file.replace("/", "."): set(filter(None, others.split(", ")))
    for file, others in re.findall(r"^\| `tora_jax/(\S+)\.py` \|.*\| *(.*?) *\|$", ARCHITECTURE, re.MULTILINE)
}


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "tora_jax").with_suffix("").parts)


PACKAGE = {module_name(p): p for p in (ROOT / "tora_jax").rglob("*.py") if p.name != "__init__.py"}


def test_the_table_is_complete():
    assert ALLOWED.keys() == PACKAGE.keys()


@pytest.mark.parametrize("name", PACKAGE)
def test_package_imports(name):
    ours = {i.removeprefix("tora_jax.") for i in imports(PACKAGE[name]) if i.startswith("tora_jax.")}
    ours = {i for i in ours if i in PACKAGE or i.split(".")[0] == "configs"} - {"errors"}
    allowed = {i for i in ours if {i, i.split(".")[0]} & ALLOWED[name]}
    assert ours == allowed, f"{name} may not import {ours - allowed}"


@pytest.mark.parametrize("name", PACKAGE)
def test_nothing_heavy_and_nothing_above(name):
    roots = {i.split(".")[0] for i in imports(PACKAGE[name])}
    assert not roots & {"torch", "tensorflow", "transformers", "diffusers", "convert_weights", "configs"}


def test_converters_stand_on_models_and_files_alone():
    allowed = {"models", "checkpoint", "release", "sharding", "errors", "configs"}
    for path in (ROOT / "convert_weights").glob("*.py"):
        ours = {i.split(".")[1] for i in imports(path) if i.startswith("tora_jax.")}
        assert ours <= allowed, f"{path.name} may not import {ours - allowed}"


def test_torch_is_only_imported_lazily_by_the_converters():
    for path in [*(ROOT / "convert_weights").glob("*.py"), *ROOT.glob("*.py"), *(ROOT / "configs").glob("*.py")]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not any(n.split(".")[0] in ("torch", "tensorflow") for n in names), path
