"""Errors that a notebook's widgets hide. The source of this file runs as a cell of the notebook that is tested."""

import ipywidgets
from ipywidgets.widgets.widget import _instances


def ends(control):
    """Values to try: both ends of a slider, every option of a choice, both states of a box."""
    if hasattr(control, "options"):
        return [value for _, value in control._options_full]
    if hasattr(control, "min") and hasattr(control, "max"):
        ranges = isinstance(control.value, tuple)
        return [(control.min, control.max)] if ranges else [control.min, control.max]
    return [True, False] if isinstance(control.value, bool) else [control.value]


def hidden(widget):
    """What a widget says of an error."""
    outputs = getattr(widget, "outputs", ()) if isinstance(widget, ipywidgets.Output) else ()
    said = [f"{output.get('ename')}: {output.get('evalue')}" for output in outputs if output.get("ename")]
    field = getattr(widget, "error", None)
    return said + ([field.value] if getattr(field, "value", "") else [])


def sweep():
    """Move every control of every explorer to its ends, one at a time; the errors that widgets say then or before."""
    said = [sentence for widget in list(_instances.values()) for sentence in hidden(widget)]
    for widget in list(_instances.values()):
        for name, control in getattr(widget, "controls", {}).items():
            start = control.value
            for value in ends(control):
                try:
                    control.value = value
                except Exception as error:
                    said.append(f"{name} = {value!r}: {type(error).__name__}: {error}")
                said += [f"{name} = {value!r}: {sentence}" for sentence in hidden(widget)]
            control.value = start
    return said
