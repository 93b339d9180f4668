"""The kinds of values that a configuration's fields declare, and one check for all of them.

A field's annotation says what it accepts, `steps: Count`, `decay: Literal["constant", "linear"]`; `check_fields`
compares every value with it and names the first one that does not fit.
"""

import sys
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval

from .errors import InputError

Count = Annotated[int, Ge(1)]
Few = Annotated[int, Interval(ge=1, le=1000)]  # modules of a network, which a damaged file may number by the billion
Side = Annotated[int, Interval(ge=1, le=65_536)]  # pixels along a side of an image
Index = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Percent = Annotated[int, Interval(ge=1, le=100)]
Share = Annotated[float, Interval(ge=0, le=1)]
Decay = Annotated[float, Interval(ge=0, lt=1)]  # of an average that forgets


def check_fields(config: Any, prefix: str = "") -> None:
    """Raise InputError unless every field of a dataclass instance holds what its annotation declares.

    It knows Literals, True or False, whole numbers, finite numbers and their ranges, text, tuples of these and their
    length, and any of them or None. `prefix` precedes the field's name in the message.
    """
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if fault := _fault(value, kind):
            raise InputError(f"{prefix}{name} is {value!r}; {fault}")


def _fault(value: Any, kind: Any) -> str:
    """What the value has to be, as the end of a sentence; empty if the value is fine."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _fault(value, arguments[0]) or _outside(value, arguments[1:])
    if origin is Literal:
        return "" if value in arguments else f"allowed: {', '.join(map(str, arguments))}"
    if origin in (types.UnionType, Union):
        faults = [_fault(value, argument) for argument in arguments if argument is not types.NoneType]
        may_be_none = types.NoneType in arguments
        fits = not all(faults) or (may_be_none and value is None)
        return "" if fits else f"{faults[0]}{', or None' * may_be_none}"
    if origin is tuple:
        return _tuple_fault(value, arguments)
    if kind is bool:
        return "" if isinstance(value, bool) else "it has to be True or False"
    if kind is int:
        if not isinstance(value, int) or isinstance(value, bool):
            return "it has to be a whole number"
        return "" if abs(value) < 2**63 else "it has to be below 2⁶³"
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return "" if number and abs(value) <= sys.float_info.max else "it has to be a finite number"
    return "" if isinstance(value, kind) else f"it has to be {'text' if kind is str else f'a {kind.__name__}'}"


def _outside(value: float, limits: tuple[Any, ...]) -> str:
    for limit in limits:
        match limit:
            case Ge(0) if value < 0:
                return "it cannot be negative"
            case Ge(lowest) if value < lowest:
                return f"it has to be at least {lowest}"
            case Gt(bound) if value <= bound:
                return f"it has to be greater than {bound}"
            case Interval(ge=lowest, lt=bound) if bound is not None and not lowest <= value < bound:
                return f"it has to be at least {lowest} and below {bound}"
            case Interval(ge=lowest, le=highest) if highest is not None and not lowest <= value <= highest:
                return f"it has to lie between {lowest} and {highest}"
    return ""


def _tuple_fault(value: Any, kinds: tuple[Any, ...]) -> str:
    if not isinstance(value, tuple):
        return "it has to be a tuple"
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(value) != len(kinds):
        return f"it has to have {len(kinds)} entries"
    return next((fault for entry, kind in zip(value, kinds, strict=True) if (fault := _fault(entry, kind))), "")
