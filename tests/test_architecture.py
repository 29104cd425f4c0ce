"""Rules that hold over the whole of the code."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_nothing_outside_a_backbone_knows_its_models():
    """Sampling, training and data ask the backbone of the config; its models are named by it, and by configs alone."""
    names = re.compile(r"STDiT|micro_frame|null_caption")
    files = [ROOT / "train.py", *ROOT.glob("tora_jax/**/*.py")]
    inside = {ROOT / "tora_jax" / folder for folder in ("backbones", "models")}
    outside = [path for path in files if path.parent not in inside]
    assert len(files) > len(outside) > 50
    assert not [path for path in outside if names.search(path.read_text())]
