"""Where two configurations differ, for every message and table that compares them."""

import dataclasses
from typing import Any, NamedTuple


class Difference(NamedTuple):
    """One entry in which two configurations differ; a missing entry is None."""

    name: str  # dotted if nested, "model.width"
    old: Any
    new: Any


def differences(old: Any, new: Any) -> list[Difference]:
    """The entries that differ between two dataclass instances or nested dictionaries, by name.

    Lists and tuples with equal entries are equal, since JSON knows only lists.
    """
    old, new = (_entries(config) for config in (old, new))
    found = []
    for name in sorted(old.keys() | new.keys()):
        before, after = _plain(old.get(name)), _plain(new.get(name))
        if isinstance(before, dict) and isinstance(after, dict):
            found += [d._replace(name=f"{name}.{d.name}") for d in differences(before, after)]
        elif before != after:
            found.append(Difference(name, before, after))
    return found


def _entries(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config


def _plain(value: Any) -> Any:
    """The value with all tuples turned into lists, nested ones included."""
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
