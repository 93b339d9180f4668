"""Every field of every configuration refuses invalid values in one sentence; flags and JSON restore a config."""

import dataclasses
import json
import math
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnerd import SIZES, InputError
from pixnerd.checks import Count, NotNegative, Positive, Share, check_fields
from pixnerd.cli import as_flags, parse
from pixnerd.config import EvaluationConfig, SamplingConfig, TrainConfig
from pixnerd.differences import differences
from pixnerd.model_config import ModelConfig, TextModelConfig
from pixnerd.recipes import RECIPES

CONFIGS = {
    "train": TrainConfig(),
    "sampling": SamplingConfig(),
    "evaluation": EvaluationConfig("run"),
    "model": ModelConfig(),
    "text model": TextModelConfig(),
}


def wrong_values(kind):
    """Values that a field of this kind cannot hold."""
    if get_origin(kind) is Annotated:
        return [*wrong_values(get_args(kind)[0]), -1e9]
    if get_origin(kind) is Literal:
        return ["step", 16, None]
    if kind is bool:
        return ["yes", 1, None]
    if kind is int:
        return [1.5, "2", True, math.nan]
    if kind is float:
        return [math.nan, math.inf, -math.inf, "1", True]
    if kind is str:
        return [3, None]
    return [object()]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_refuses_values_of_another_kind(name):
    config = CONFIGS[name]
    tried = 0
    for field, kind in get_type_hints(type(config), include_extras=True).items():
        for value in wrong_values(kind):
            with pytest.raises(InputError, match=f"{field} is .+; (it|allowed)") as refused:
                dataclasses.replace(config, **{field: value})
            assert "\n" not in str(refused.value)
            tried += 1
    assert tried > 3 * len(dataclasses.fields(config)) / 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"decay": "step"}, "decay is 'step'; allowed: constant, linear, cosine"),
        ({"precision": "bf16"}, "precision is 'bf16'; allowed: auto, float32, bfloat16"),
        ({"compile": "yes"}, "compile is 'yes'; allowed: auto, on, off"),
        ({"recompute": "some"}, "recompute is 'some'; allowed: none, head, all"),
        ({"learning_rate": math.nan}, "learning_rate is nan; it has to be a finite number"),
        ({"clip": 0.0}, "clip is 0.0; it has to be greater than 0, or None"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\); it has to be at least 0 and below 1"),
        ({"steps": 9, "average_every": 10}, "average_every is 10; a training run of 9 steps would have no average"),
        ({"betas": (0.9,)}, r"betas is \(0.9,\); it has to have 2 entries"),
        ({"extra_ema_decays": [0.5]}, r"extra_ema_decays is \[0.5\]; it has to be a tuple"),
        ({"seed": -1}, "seed is -1; it cannot be negative"),
        ({"seed": 2**63}, "seed is 9223372036854775808; it has to be below 2⁶³"),
        ({"learning_rate": 2 * 10**308}, "learning_rate is 20{308}; it has to be a finite number"),
        ({"steps": 2.0}, "steps is 2.0; it has to be a whole number"),
        ({"model": "L/16"}, "model is 'L/16'; it has to be a ModelConfig"),
    ],
)
def test_training_settings_once_ignored_silently_are_refused(changes, sentence):
    with pytest.raises(InputError, match=f"^{sentence}$"):
        TrainConfig(**changes)


@settings(deadline=None)
@given(st.floats(), st.integers(-5, 5))
def test_ranges_hold_exactly(number, count):
    @dataclasses.dataclass(frozen=True)
    class Ranges:
        positive: Positive = 1.0
        not_negative: NotNegative = 0.0
        share: Share = 0.5
        count: Count = 1
        maybe: Positive | None = None

    fits = {
        "positive": math.isfinite(number) and number > 0,
        "not_negative": math.isfinite(number) and number >= 0,
        "share": 0 <= number <= 1,
        "maybe": math.isfinite(number) and number > 0,
    }
    values = {name: number for name in fits} | {"count": count}
    for name, fit in (fits | {"count": count >= 1}).items():
        config = Ranges(**{name: values[name]})
        if fit:
            check_fields(config)
        else:
            with pytest.raises(InputError, match=f"^{name} is "):
                check_fields(config)


@pytest.mark.parametrize("name", RECIPES)
def test_flags_and_json_restore_every_recipe(name):
    config = dataclasses.replace(RECIPES[name], sampling=SamplingConfig(steps=3, interval=None))
    size = ["--size", "text-nano/8" if isinstance(config.model, TextModelConfig) else "nano/8"]
    assert parse(["train", *size, *as_flags(config)]).config == config
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 50),
    st.sampled_from(["euler", "sde"]),
    st.one_of(st.none(), st.just((0.25, 0.5))),
    st.floats(-5, 5),
    st.one_of(st.none(), st.just("a file.npz")),
)
def test_flags_restore_an_evaluation(draw, solver, interval, guidance, out):
    sampling = SamplingConfig(solver=solver, interval=interval, guidance=guidance)
    config = EvaluationConfig("no run", draw=draw, sampling=sampling, out=out)
    found = parse(["evaluate", *as_flags(config), "--seed", "0", "no run"])
    assert {field.name: getattr(found, field.name) for field in dataclasses.fields(config)} == vars(config)


def test_differences_are_named_with_both_values():
    old = TrainConfig(model=SIZES["nano/8"], betas=(0.9, 0.99))
    new = dataclasses.replace(old, model=dataclasses.replace(old.model, width=128), seed=3)
    assert differences(old, new) == [("model.width", 64, 128), ("seed", 0, 3)]
    assert differences(old, json.loads(json.dumps(old.to_dict()))) == []  # JSON turns tuples into lists
    assert differences({"a": {"b": [1, (2,)]}, "c": 1}, {"a": {"b": (1, [2])}, "d": 2}) == [
        ("c", 1, None),
        ("d", None, 2),
    ]
