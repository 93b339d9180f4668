"""What papermill gave a notebook, checked: papermill itself only warns about a name that the notebook does not have."""

import ast
from collections.abc import Sequence
from typing import Any

from ..errors import InputError

INJECTED = "# Parameters\n"  # how papermill begins the cell that it puts behind the one tagged `parameters`


def check_parameters(executed: Sequence[str]) -> None:
    """Refuse what papermill injected unless the notebook has such parameters; without papermill there is nothing to do.

    Args:
        executed: the source of every cell run so far, which a notebook has as `In`: `check_parameters(In)`.

    Raises:
        InputError: an unknown name, or a value of another kind than the default (text, a number, a list of numbers …).
    """
    places = [place for place, source in enumerate(executed) if source.startswith(INJECTED)]
    if not places:
        return
    before = [source for source in executed[: places[-1]] if not source.startswith(INJECTED)]
    defaults, given = _assigned(before[-1]), _assigned(executed[places[-1]])
    unknown = [name for name in given if name not in defaults]
    if unknown:
        raise InputError(
            f"unknown parameter {', '.join(unknown)}; this notebook has {', '.join(defaults) or 'no parameters'}"
        )
    for name, value in given.items():
        default = defaults[name]
        empty = isinstance(value, list) and isinstance(default, list) and not (value and default)
        if _kind(value) != _kind(default) and not empty:
            raise InputError(f"parameter {name} is {value!r}; it has to be {_kind(default)}")


def _assigned(source: str) -> dict[str, Any]:
    """Names and values of the literals that a cell assigns."""
    statements = [statement for statement in ast.parse(source).body if isinstance(statement, ast.Assign)]
    return {target.id: ast.literal_eval(s.value) for s in statements for target in s.targets}


def _kind(value: object) -> str:
    match value:
        case bool():
            return "True or False"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return " of ".join(["a list", *sorted({_kind(entry) for entry in value})])
    return type(value).__name__
