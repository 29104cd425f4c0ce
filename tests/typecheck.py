"""The checker of type annotations that pyproject.toml names: beartype, where an int is a float (PEP 484)."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable) -> Callable:
    """Checks calls of a function; those inside functions would have to be compiled at each call of the outer one."""
    return function if "<locals>" in function.__qualname__ else _checked(function)
