"""Who may import whom: the table in docs/architecture.md, held by reading the imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODELS = {
    "layers": set(),
    "autoencoder_kl": {"layers"},
    "causal_vae": {"layers"},
    "video_vae": {"layers", "autoencoder_kl", "causal_vae"},
    "trajectory_extractor": {"layers"},
    "motion_fuser": {"layers"},
    "stdit": {"layers", "motion_fuser"},
    "tora": {"layers", "motion_fuser", "stdit", "trajectory_extractor"},
    "t5": {"layers"},
    "clip": {"layers"},
    "raft": {"layers"},
    "i3d": set(),
}
# Beside `errors`, which everyone may import. "models.*": any model.
ALLOWED = {
    "errors": set(),
    "trajectory": set(),
    "flow": set(),
    "video_io": set(),
    "draw": set(),
    "text": set(),
    "rectified_flow": set(),
    "release": set(),
    "checkpoint": set(),
    "data.buckets": set(),
    "generate": {"models.*", "rectified_flow", "flow", "text", "release"},
    "cli": {"generate", "trajectory", "flow", "video_io", "draw", "release", "data.buckets"},
    **{f"models.{name}": {f"models.{other}" for other in others} for name, others in MODELS.items()},
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


@pytest.mark.parametrize("name", PACKAGE)
def test_package_imports(name):
    assert name in ALLOWED, f"{name} is new: give it a line here and in docs/architecture.md"
    ours = {i.removeprefix("tora_jax.") for i in imports(PACKAGE[name]) if i.startswith("tora_jax.")}
    ours = {i for i in ours if i in PACKAGE} - {"errors"}
    allowed = {i for i in ours if i in ALLOWED[name] or ("models.*" in ALLOWED[name] and i.startswith("models."))}
    assert ours == allowed, f"{name} may not import {ours - allowed}"


@pytest.mark.parametrize("name", PACKAGE)
def test_nothing_heavy_and_nothing_above(name):
    roots = {i.split(".")[0] for i in imports(PACKAGE[name])}
    assert not roots & {"torch", "tensorflow", "transformers", "diffusers", "convert_weights", "configs"}


def test_converters_stand_on_models_and_files_alone():
    allowed = {"models", "checkpoint", "release", "errors", "configs"}
    for path in (ROOT / "convert_weights").glob("*.py"):
        ours = {i.split(".")[1] for i in imports(path) if i.startswith("tora_jax.")}
        assert ours <= allowed, f"{path.name} may not import {ours - allowed}"


def test_torch_is_only_imported_lazily_by_the_converters():
    for path in [*(ROOT / "convert_weights").glob("*.py"), *ROOT.glob("*.py"), *(ROOT / "configs").glob("*.py")]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not any(n.split(".")[0] in ("torch", "tensorflow") for n in names), path


def test_the_table_in_the_docs_is_this_one():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for name in PACKAGE:
        file = name.split(".")[-1] + ".py"
        assert file in text, f"docs/architecture.md does not name {file}"
