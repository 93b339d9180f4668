"""What two configurations disagree in, for every message and table that compares them."""

import dataclasses
from typing import Any, NamedTuple


class Difference(NamedTuple):
    """One entry that two configurations disagree in; a missing entry is None."""

    name: str  # dotted where it is nested, "model.width"
    old: Any
    new: Any


def differences(old: Any, new: Any) -> list[Difference]:
    """The entries that differ between two dataclass instances or nested dictionaries, by name.

    Lists and tuples with equal entries are equal, since JSON knows only one of them.
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
    """Tuples as lists, all the way down."""
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
