"""What a checkpoint type must say of itself; one for each file of `convert_weights.tables`."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from convert_weights.mapping import Rule, Shape, flatten
from convert_weights.views import Source
from tora_jax.errors import UserError
from tora_jax.io.files import tuples

Shapes = Mapping[str, Shape]
Fields = dict[str, Any]
Read = Callable[[str], np.ndarray]  # key of a source tensor -> the tensor


class Notation(NamedTuple):
    """All sizes of a model in one string, the field `variant` of its section in config.json.

    Attributes:
      form: as messages show it.
      read: string -> fields. Raises ValueError.
      write: fields -> the same with `variant` in place of what it says.
    """

    form: str
    read: Callable[[str], Fields]
    write: Callable[[Fields], Fields]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointType:
    """One sort of checkpoint: its table, its model, and the sizes that were released.

    Attributes:
      name: on the command line.
      part: of a release folder: the name of its file and of its section in config.json.
      view: a checkpoint under the names that the table knows, where it has others. Raises UserError for a model that
        has these names and works in another way.
      table: see mapping.py.
      ignored: patterns of tensors that our model computes itself; an export writes them again.
      dropped: patterns of tensors of other models in the same file.
      added: pattern of the parameters, as our paths, that a plain base of the model lacks: all of them, or none.
      infer: shapes -> the fields that they tell; see infer_fields.py.
      init: (key, fields) -> the model's parameters. Only their shapes are computed.
      released: variant -> fields.
      needs: fields that shapes cannot tell; nested ones are joined by dots.
      config_names: field -> its name in a config.json that comes with the checkpoint.
      notation: of its sizes, where they have one.
      constants: name -> a tensor that PyTorch's module holds and ours computes, of these fields.
      tied: two names of one tensor: a file carries either or both. The first is kept.
      untie: a mapping by source keys -> the same without the second name, if it has both. Raises ConversionError when
        they differ.
      check: looks at tensors that the shapes say nothing about: (source keys, read). Raises ConversionError.
      tokenizer: source -> the tokenizer that lies beside the weights, or None; unset: the model needs none.
      licence: of the published weights, told when they are converted.
      split: fields -> the files that hold parts of the checkpoint apart, and the prefix that their names lack.
      lora: what stands in front of the names in PyTorch's adapters; None: there are none.
      in_tora: in a whole release, the part `tora` holds it beside parameters of others.
    """

    name: str
    part: str
    view: Callable[[Source], Source] = lambda source: source
    table: Sequence[Rule]
    ignored: Sequence[str] = ()
    dropped: Sequence[str] = ()
    added: str = ""
    infer: Callable[[Shapes], Fields]
    init: Callable[[jax.Array, Fields], Any]
    released: Mapping[str, Fields]
    needs: tuple[str, ...] = ()
    config_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notation: Notation | None = None
    constants: Mapping[str, Callable[[Fields], np.ndarray]] = dataclasses.field(default_factory=dict)
    tied: tuple[str, ...] = ()
    untie: Callable[[Mapping], dict] = dict
    check: Callable[[Sequence[str], Read], None] | None = None
    tokenizer: Callable[[Source], Path | None] | None = None
    licence: str = ""
    split: Callable[[Fields], Mapping[str, str]] | None = None
    lora: str | None = None
    in_tora: bool = False

    def shapes(self, fields: Fields) -> dict[str, Shape]:
        """Parameter path -> shape.

        Raises:
          UserError: for a field that the model does not have.
        """
        try:
            return dict(_shapes(self.init, json.dumps(fields)))
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.name}: these sizes make no model: {str(error).splitlines()[0]}") from None

    def section(self, fields: Fields) -> Fields:
        """The fields as config.json has them."""
        return fields if self.notation is None else self.notation.write(fields)


@functools.cache  # tracing a model takes seconds
def _shapes(init: Callable[[jax.Array, Fields], Any], fields: str) -> dict[str, Shape]:
    params = jax.eval_shape(lambda key: init(key, tuples(json.loads(fields))), jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten(params).items()}
