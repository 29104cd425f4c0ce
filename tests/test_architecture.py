"""What holds the house together: who imports whom, how long things are, what is packaged."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OURS = [
    ROOT / "train.py",
    *sorted(path for folder in ("tora_jax", "convert_weights") for path in (ROOT / folder).rglob("*.py")),
]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 10
# ST-DiT's forward pass, read beside the reference's, and a training, read in one sitting.
LONG = {("tora_jax/models/stdit.py", "STDiT.__call__"), ("train.py", "main")}


def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def functions(node: ast.AST, scope: str = ""):
    """(name with its classes and functions, definition) of every function in a tree."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{scope}{child.name}"
            if not isinstance(child, ast.ClassDef):
                yield name, child
            yield from functions(child, f"{name}.")
        else:
            yield from functions(child, scope)


def test_the_layers_of_pyproject_hold():
    # In a process of its own: the linter's console keeps pytest's captured output, and writes to it once it is closed.
    command = "import sys; from importlinter import cli; sys.exit(cli.lint_imports(no_cache=True, no_logo=True))"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_configs_stand_under_backbones():
    """What import-linter cannot see: the folder configs/ is the package tora_jax.configs once it is installed."""
    under = ("errors", "typing", "sharding", "io", "diffusion", "checkpoints", "conditioning", "models")
    for name in under:
        folder = ROOT / "tora_jax" / name
        for path in folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]:
            assert not any(name.startswith(("tora_jax.configs", "configs")) for name in imports(path)), path


def test_nothing_outside_a_backbone_knows_its_models():
    """Sampling, training and data ask the backbone of the config; its models are named by it, and by configs alone."""
    names = re.compile(r"STDiT|micro_frame|null_caption")
    files = [ROOT / "train.py", *ROOT.glob("tora_jax/**/*.py")]
    inside = {ROOT / "tora_jax" / folder for folder in ("backbones", "models")}
    outside = [path for path in files if path.parent not in inside]
    assert len(files) > len(outside) > 50
    assert not [path for path in outside if names.search(path.read_text())]


def test_torch_is_only_imported_lazily_by_the_converters():
    files = [path for folder in ("convert_weights", "configs") for path in (ROOT / folder).rglob("*.py")]
    for path in [*files, *ROOT.glob("*.py")]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not any(name.split(".")[0] in ("torch", "tensorflow") for name in names), path


# Calls that open a file of this machine by its name, which may be one in a bucket.
OPENERS = re.compile(
    r"(os\.|io\.|codecs\.|gzip\.|epath\.|fsspec\.)?open"
    r"|np\.(loadtxt|genfromtxt|fromfile|memmap|savetxt|savez)"
    r"|cv2\.(imread|imwrite|VideoCapture|VideoWriter)|imageio\.\w+"
)


def test_files_are_opened_through_io_alone():
    """Elsewhere paths come from `files.path`, flags too, and what a library opens from `files.local`."""
    calls = [
        (path, node)
        for path in OURS
        if path.parent != ROOT / "tora_jax" / "io"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]
    assert len(calls) > 1000
    for path, node in calls:
        assert not OPENERS.fullmatch(ast.unparse(node.func)), f"{path}: {ast.unparse(node)}"
        types = [ast.unparse(word.value) for word in node.keywords if word.arg == "type"]
        assert not {"Path", "pathlib.Path", "open"} & set(types), f"{path}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path):
    text, name = path.read_text(), str(path.relative_to(ROOT))
    assert len(text.splitlines()) <= MAX_FILE_LINES, f"{name} is too long: which ideas are in it?"
    for function, node in functions(ast.parse(text)):
        if (name, function) in LONG:
            continue
        arguments = node.args
        count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
        assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{name}: {function} is too long"
        assert count <= MAX_PARAMETERS, f"{name}: {function} takes {count} parameters; which belong together?"


def test_every_folder_of_python_is_packaged():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    folders = {
        f"{prefix}{'.'.join(path.parent.relative_to(ROOT).parts)}"
        for folder, prefix in (("tora_jax", ""), ("convert_weights", ""), ("configs", "tora_jax."))
        for path in (ROOT / folder).rglob("*.py")
    }
    assert sorted(listed) == sorted(folders)
