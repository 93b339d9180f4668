import dataclasses

import torch

from pixnerd import recipes
from pixnerd.explore.lessons import trained_digits
from pixnerd.runs import Run
from pixnerd.training import train


def equal(first, second):
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_short_run_is_trained_once(tmp_path):
    model, config = trained_digits(tmp_path / "lesson", 2)
    assert (config.steps, config.compile, config.data) == (2, "off", "digits")
    log = Run(config.out).read_log()
    again, _ = trained_digits(tmp_path / "lesson", 2)
    assert equal(model, again)
    assert Run(config.out).read_log() == log


def test_the_quickstarts_model_is_used_once_it_is_finished(tmp_path):
    """A quickstart that was stopped, or has other data, is not used."""
    config = dataclasses.replace(recipes.quickstart(), out=str(tmp_path / "quickstart"), steps=3, compile="off", seed=5)
    run = train(config, torch.device("cpu"))
    next(run)
    run.close()  # saved after step 1 of 3
    short, found = trained_digits(tmp_path / "lesson", 2)
    assert found.out == str(tmp_path / "lesson")
    list(train(config, torch.device("cpu")))
    finished, found = trained_digits(tmp_path / "lesson", 2)
    assert (found.out, found.steps) == (config.out, 3)
    assert not equal(short, finished)
