"""The parameters of a notebook: a check of those that papermill injects, and the folder where a run lands without any.

papermill itself only warns about unknown names.
"""

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError

PLURALS = {"a number": "numbers", "a whole number": "whole numbers", "text": "texts"}
INJECTED = "# Parameters\n"  # starts the cell that papermill inserts after the one tagged `parameters`


def check_parameters(executed: Sequence[str]) -> None:
    """Refuse injected parameters that the notebook does not have; without papermill there is nothing to check.

    Args:
        executed: the source of every cell run so far, which a notebook has as `In`: `check_parameters(In)`.

    Raises:
        InputError: an unknown name, or a value whose kind (text, a number, a list of numbers …) is not the default's;
            a whole number is a number, too.
    """
    injected = [index for index, source in enumerate(executed) if source.startswith(INJECTED)]
    if not injected:
        return
    before = [source for source in executed[: injected[-1]] if not source.startswith(INJECTED)]
    defaults, given = _assigned(before[-1]), _assigned(executed[injected[-1]])
    unknown = [name for name in given if name not in defaults]
    if unknown:
        raise InputError(
            f"unknown parameter {', '.join(unknown)}; this notebook has {', '.join(defaults) or 'no parameters'}"
        )
    for name, value in given.items():
        default = defaults[name]
        empty = isinstance(value, list) and isinstance(default, list) and not (value and default)
        if _kind(default) not in (_kind(value), _kind(value, whole=False)) and not empty:
            raise InputError(f"parameter {name} is {value!r}; it has to be {_kind(default)}")


def in_project(path: str) -> str:
    """A path in the project, wherever a notebook is started; without the project, in the current folder."""
    project = Path(__file__).parents[2]
    return str((project if (project / "pyproject.toml").is_file() else Path()).absolute() / path)


def folder_of_run(name: str) -> str:
    """runs/NAME, see `in_project`."""
    return in_project(f"runs/{name}")


def _assigned(source: str) -> dict[str, Any]:
    """The names and literal values that a cell assigns."""
    statements = [statement for statement in ast.parse(source).body if isinstance(statement, ast.Assign)]
    return {target.id: ast.literal_eval(s.value) for s in statements for target in s.targets}


def _kind(value: object, whole: bool = True) -> str:
    """What a value is, in words; with `whole`, a whole number is told from others."""
    match value:
        case bool():
            return "True or False"
        case int():
            return "a whole number" if whole else "a number"
        case float():
            return "a number"
        case str():
            return "text"
        case list():
            whole = whole and not any(isinstance(entry, float) for entry in value)
            kinds = sorted({_kind(entry, whole) for entry in value})
            return "a list" + " of " * bool(kinds) + " or ".join(PLURALS.get(kind, kind) for kind in kinds)
    return type(value).__name__
