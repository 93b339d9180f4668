"""An interactive figure: a plain function from values to a figure, with controls that set the values."""

import html
import io
from collections.abc import Callable

import ipywidgets as widgets
from matplotlib.figure import Figure

DPI = 100


class Explorer(widgets.VBox):
    """Controls above a picture, which `render` redraws whenever one of them is released.

    An error is shown in `error` below the controls and raised as well, so that a notebook and its tests see it.

    Args:
        render: the controls' values by name → a figure. It does not depend on widgets, so it can be tested without.
        controls: one widget with a `value` for each argument of `render`; an empty label becomes the name.
    """

    def __init__(self, render: Callable[..., Figure], **controls: widgets.Widget):
        self.render, self.controls = render, controls
        self.image, self.error = widgets.Image(format="png", layout={"max_width": "100%"}), widgets.HTML()
        for name, control in controls.items():
            control.description = control.description or name.replace("_", " ")
            control.style.description_width = "110px"
            control.layout.width = "360px"
            if control.has_trait("continuous_update"):
                control.continuous_update = False
            control.observe(self._draw, "value")
        super().__init__([*controls.values(), self.error, self.image], layout={"align_items": "flex-start"})
        self._draw()

    def _draw(self, _: object = None) -> None:
        self.error.value = ""
        try:
            figure = self.render(**{name: control.value for name, control in self.controls.items()})
        except Exception as error:
            self.error.value = f'<div style="color: #c62828">{html.escape(f"{type(error).__name__}: {error}")}</div>'
            raise
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
        self.image.value = file.getvalue()
