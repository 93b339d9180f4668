"""A project of invented studies."""

import pytest

from . import synthetic

SMALL = {
    "axes": {
        "head": {"linear": {"model.head": "linear"}, "field": {}, "shared": {"model.field_weights": "shared"}},
        "prediction": {"v": {"model.prediction": "v"}, "x": {"model.prediction": "x"}},
        "ratio": {"0.4": {"model.patch_size": 4, "model.image_size": 16}, "1.5": {"model.image_size": 32}},
    }
}


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """A project with the record of a study of 3 × 2 × 2 arms and six seeds, of which two runs are missing."""
    project = tmp_path_factory.mktemp("recorded")
    synthetic.record(project, synthetic.copy_study(project, **SMALL), missing={3, 67})
    return project
