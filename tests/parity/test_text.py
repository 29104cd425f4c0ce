"""Caption cleaning and tokens against the reference's rules and transformers' T5 tokenizer."""

import json

import numpy as np

from tests.parity import golden
from tora_jax.conditioning import text


def read(name: str):
    return json.loads((golden.GOLDEN_DIR / name).read_text(encoding="utf-8"))


def test_cleaning():
    rows = read("captions.json")
    assert [text.clean(row["raw"]) for row in rows] == [row["cleaned"] for row in rows]


def test_tokens():
    data = read("tokens.json")
    tokenizer = text.Tokenizer(golden.GOLDEN_DIR / "tokenizer.model", data["max_length"])
    ids, mask = tokenizer([row["text"] for row in data["rows"]])
    np.testing.assert_array_equal(ids, [row["ids"] for row in data["rows"]])
    valid = np.array([row["valid"] for row in data["rows"]])
    np.testing.assert_array_equal(mask, np.arange(data["max_length"]) < valid[:, None])
