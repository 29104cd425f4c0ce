"""The sizes of a checkpoint's model: by a released variant, by the user, or by the shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from convert_weights import mapping
from convert_weights.folders import parse_json
from convert_weights.typing import CheckpointType, Fields, Notation
from convert_weights.views import Source
from tora_jax.errors import UserError
from tora_jax.io import files
from tora_jax.io.files import tuples


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Fields:
    flat: Fields = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: tuples(value)}
    return flat


def _nested(flat: Fields) -> Fields:
    return mapping.unflatten({path.replace(".", "/"): value for path, value in flat.items()})


def read_variant(kind: CheckpointType, variant: str) -> Fields:
    """What --variant says: a released name, the sizes in the type's own notation, or fields as JSON or a JSON file.

    Raises:
      UserError: for anything else.
    """
    if variant in kind.released:
        return kind.released[variant]
    if variant.startswith("{") or variant.endswith(".json"):
        text = variant if variant.startswith("{") else files.path(variant).read_text(encoding="utf-8")
        fields = parse_json(text, "--variant")
        if kind.notation is not None and "variant" in fields:
            fields = {**fields, **_read_notation(kind.notation, fields["variant"])}
        return fields
    if kind.notation is not None:
        return _read_notation(kind.notation, variant)
    raise UserError(f"--variant {variant}: {kind.name} has {', '.join(kind.released)}, or give fields as JSON")


def _read_notation(notation: Notation, variant: str) -> Fields:
    try:
        return notation.read(variant)
    except ValueError as error:
        raise UserError(f"--variant: {error}") from None


def infer(kind: CheckpointType, source: Source, variant: str | None) -> tuple[str, Fields]:
    """The fields of a checkpoint's model, and the variant's name ("own sizes" where none was released).

    Args:
      variant: what the user says; None = by the shapes alone.

    Raises:
      UserError: it is no such checkpoint, of another variant, or does not tell a field.
    """
    rules = [mapping.pattern(rule.source) for rule in kind.table]
    if not any(rule.fullmatch(key) for rule in rules for key in source.shapes):
        known = next(iter(source.shapes))
        raise UserError(f"{source.name}: no tensor of a {kind.name} checkpoint inside (it holds {known} ...)")
    inferred = _flat(kind.infer(source.shapes))
    given: Fields = {}
    if variant is not None:
        given = _flat(read_variant(kind, variant))
        wrong = [f"{k} {inferred[k]}, not {v}" for k, v in given.items() if k in inferred and inferred[k] != v]
        if wrong:
            raise UserError(f"{source.name}: wrong variant: --variant {variant}, but the file has {'; '.join(wrong)}")
    told = inferred | given
    fits = (all(told.get(k, v) == v for k, v in _flat(fields).items()) for fields in kind.released.values())
    name = next((name for name, fit in zip(kind.released, fits, strict=True) if fit), None)
    if name is not None:
        # Sizes missing in a damaged checkpoint are the released ones: its tensors are then reported as missing.
        inferred = _flat(kind.released[name]) | inferred
    beside = {k: v for k, path in kind.config_names.items() if (v := _lookup(source.config, path)) is not None}
    fields = inferred | beside | given
    if unknown := [field for field in kind.needs if field not in fields]:
        example = kind.notation.form if kind.notation else json.dumps(_nested(dict.fromkeys(unknown, 8)))
        raise UserError(f"{source.name}: shapes do not tell {', '.join(unknown)}; give it, as in --variant '{example}'")
    return name or "own sizes", _nested(fields)


def _lookup(config: Mapping[str, Any], path: str) -> Any:
    """A value in a config.json, by names joined with dots."""
    value: Any = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
