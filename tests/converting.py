"""What the converter's tests share: golden weights as the files that a user has, and what an error must look like."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from convert_weights import __main__ as command
from tests.parity import golden

ROOT = Path(__file__).parent.parent


def norm_groups(count: int) -> dict:
    return {"norm_groups": count}


def stdit_variant(c: dict) -> str:
    return f"{c['depth']}x{c['hidden_size']}x{c['num_heads']}/2"


# Golden file -> (kind, part, what shapes cannot tell).
CASES = {
    "stdit3_text_mask": ("stdit3", "stdit", stdit_variant),
    "stdit3_image_no_qknorm": ("stdit3", "stdit", stdit_variant),
    "autoencoder_kl": ("vae2d", "autoencoder_kl", lambda c: json.dumps(norm_groups(c["norm_num_groups"]))),
    "video_vae_pipeline": (
        "vae",
        "vae",
        lambda c: json.dumps(
            {
                "spatial": norm_groups(c["spatial"]["norm_num_groups"]),
                "temporal": norm_groups(c["temporal"]["num_groups"]),
            }
        ),
    ),
    "t5_encoder": ("t5", "t5", lambda c: None),
    "raft_narrow": (
        "raft",
        "raft",
        lambda c: json.dumps({"corr_levels": c["corr_block_num_levels"], "corr_radius": c["corr_block_radius"]}),
    ),
    "clip": (
        "clip",
        "clip",
        lambda c: json.dumps({t: {"num_heads": c[t]["num_attention_heads"]} for t in ("text", "vision")}),
    ),
}


def main(argv: list[str]) -> int:
    """The exit code of the command."""
    try:
        command.main(argv)
    except SystemExit as end:
        return end.code
    return 0


def write_source(path: Path, name: str, **changes: np.ndarray | None) -> list[str]:
    """A golden file's weights under PyTorch's names; returns the arguments that convert them."""
    kind, _, variant = CASES[name]
    data = golden.load(name)
    state = {key: value for key, value in (data.params | changes).items() if value is not None}
    save_file(state, path, metadata={"format": "pt"})
    given = variant(data.config)
    return [kind, str(path), *(["--variant", given] if given else [])]


def write_tora_sources(folder: Path) -> None:
    """Writes three narrow checkpoints and a tokenizer, of which `convert_weights tora` makes a release.

    The denoiser's caption layers are made as wide as T5's features.
    """
    stdit, t5 = golden.load("stdit3_text_mask"), golden.load("t5_encoder")
    rng = np.random.default_rng(0)
    changes = {
        "y_embedder.y_embedding": (stdit.config["model_max_length"], t5.config["d_model"]),
        "y_embedder.y_proj.fc1.weight": (stdit.config["hidden_size"], t5.config["d_model"]),
    }
    normal = {key: rng.standard_normal(shape, np.float32) for key, shape in changes.items()}
    shard(folder / "t5", t5.params)
    write_source(folder / "stdit3.safetensors", "stdit3_text_mask", **normal)
    write_source(folder / "vae.safetensors", "video_vae_pipeline")
    shutil.copyfile(golden.GOLDEN_DIR / "tokenizer.model", folder / "tokenizer.model")


def tora_variant() -> str:
    """The --variant for these checkpoints."""
    name = "video_vae_pipeline"
    return json.dumps({"vae": json.loads(CASES[name][2](golden.load(name).config))})


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def refused(capsys, argv: list[str], *words: str, lines: int = 1) -> str:
    """The command fails with exit code 2, one message with these words, and writes nothing beside its sources."""
    folder = Path(argv[1]).parent if Path(argv[1]).parent.is_dir() else None
    before = contents(folder) if folder else None
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err
    message = error[error.index("convert_weights: error: ") :]
    assert message.count("\n") == lines, message
    for word in words:
        assert word in message, message
    assert folder is None or contents(folder) == before
    return message


def shard(folder: Path, state: dict[str, np.ndarray]) -> Path:
    """Two files and their index; returns the index."""
    folder.mkdir(parents=True)
    names = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for i, name in enumerate(names):
        save_file(dict(list(state.items())[i::2]), folder / name)
    index = {key: names[i % 2] for i, key in enumerate(state)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder / "model.safetensors.index.json"
