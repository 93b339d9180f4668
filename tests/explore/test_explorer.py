import io

import ipywidgets
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pixnerd.explore.explorer import DPI, Explorer


def bars(height, wide):
    """A figure whose size encodes the values."""
    return Figure((2 if wide else 1, 1 / (4 - height)))


@pytest.fixture
def explorer():
    return Explorer(bars, height=ipywidgets.IntSlider(3, 0, 4), wide=ipywidgets.Checkbox(False, description="twice"))


def size(explorer):
    return Image.open(io.BytesIO(explorer.image.value)).size


def test_the_picture_is_the_figure_of_the_values(explorer):
    assert size(explorer) == (DPI, DPI)
    explorer.controls["wide"].value = True
    assert size(explorer) == (2 * DPI, DPI)
    explorer.controls["height"].value = 2
    assert size(explorer) == (2 * DPI, DPI // 2)
    assert np.array(Image.open(io.BytesIO(explorer.image.value))).std() == 0  # only the figure


def test_controls_have_names_and_wait_until_they_are_released(explorer):
    assert [control.description for control in explorer.controls.values()] == ["height", "twice"]
    assert explorer.controls["height"].continuous_update is False
    assert set(explorer.controls.values()) <= set(explorer.children)


def test_an_error_is_shown_and_raised_and_disappears_with_its_cause(explorer):
    before = explorer.image.value
    with pytest.raises(ZeroDivisionError):
        explorer.controls["height"].value = 4
    assert "ZeroDivisionError: division by zero" in explorer.error.value
    assert explorer.image.value == before
    explorer.controls["height"].value = 3
    assert explorer.error.value == ""


def test_an_error_at_the_start_is_raised():
    with pytest.raises(ZeroDivisionError):
        Explorer(bars, height=ipywidgets.IntSlider(4, 0, 4), wide=ipywidgets.Checkbox(False))
