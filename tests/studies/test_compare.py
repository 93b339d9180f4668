"""Paired comparisons agree with scipy's on the same numbers."""

import numpy as np
import pytest
from scipy import stats

from pixnerd import InputError
from pixnerd.studies.compare import Row, at_best, best_values, bootstrap_interval, paired, sign_flip_p, table


def rows_of(seeds, noise=0.3):
    """Two heads and two predictions with each seed; the field is better by 0.2 with v and by 0.5 with x."""
    random, rows = np.random.default_rng(3), []
    for seed in range(seeds):
        shared = random.normal()
        for head in ("linear", "field"):
            for prediction in ("v", "x"):
                gain = {"v": 0.2, "x": 0.5}[prediction] * (head == "field")
                value = 10 + shared - gain + noise * random.normal()
                choices = {"head": head, "prediction": prediction}
                rows.append(Row(len(rows), choices, str(seed), {"fd": value, "loss": value / 2}))
    return rows


@pytest.mark.parametrize("count", [5, 12, 40])
def test_interval_and_p_are_those_of_scipy(count):
    differences = np.random.default_rng(count).normal(0.3, 1.0, count)
    interval = stats.bootstrap(
        (differences,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    spread = differences.std() / count**0.5
    assert np.allclose(bootstrap_interval(differences), interval, atol=0.1 * spread)
    tested = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=100_000, rng=np.random.default_rng(1)
    )
    assert sign_flip_p(differences) == pytest.approx(tested.pvalue, abs=1e-9 if count <= 12 else 0.02)


def test_exact_p_by_hand():
    assert sign_flip_p(np.array([1.0, 1.0, 1.0])) == 2 / 8
    assert sign_flip_p(np.array([-0.8, -0.5, 0.6, 0.2])) == 14 / 16  # two of the 14 differ in their last bit
    assert sign_flip_p(np.array([1.0, -1.0])) == 1
    assert sign_flip_p(np.array([2.0])) == 1
    assert sign_flip_p(np.zeros(4)) == 1


def test_pairs_share_everything_else():
    rows = rows_of(6)
    found = paired(rows, "head", "linear", "field", "fd")
    assert (found.pairs, found.seeds) == (12, 6)
    values = {(row.choices["head"], row.choices["prediction"], row.repeat): row.measures["fd"] for row in rows}
    by_hand = [
        values["field", prediction, str(seed)] - values["linear", prediction, str(seed)]
        for prediction in ("v", "x")
        for seed in range(6)
    ]
    assert found.mean == pytest.approx(np.mean(by_hand))
    assert found.low < found.mean < found.high


def test_swapping_the_arms_negates():
    rows = rows_of(7)
    there, back = (paired(rows, "head", *arms, "fd") for arms in (("linear", "field"), ("field", "linear")))
    assert back.mean == pytest.approx(-there.mean)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
    assert back.p == there.p


def test_order_and_other_runs_change_no_pair():
    rows = rows_of(6)
    before = paired(rows, "head", "linear", "field", "fd")
    other = [
        Row(90, {"head": "conv", "prediction": "v"}, "0", {"fd": 1e6}),
        Row(91, {"head": "field", "prediction": "v"}, "77", {"fd": 1e6}),  # a seed without its pair
        Row(92, {"head": "field", "prediction": "epsilon"}, "0", {"fd": 1e6}),
        Row(93, {"head": "linear", "prediction": "epsilon"}, "0", {"loss": 1.0}),  # without the measure
    ]
    assert paired([*rows, *other], "head", "linear", "field", "fd") == before


def test_no_pair_is_one_sentence():
    with pytest.raises(
        InputError, match="no two runs differ in head alone, linear and conv, and have the measure 'fd'"
    ):
        paired(rows_of(2), "head", "linear", "conv", "fd")


def test_the_table_has_every_panel_of_every_measure():
    titles, *lines = table(rows_of(4), "head")
    assert titles == ["measure", "head", "prediction", "difference", "95 % from", "to", "p", "pairs"]
    assert [line[:3] for line in lines] == [
        ["fd", "field − linear", "v"],
        ["fd", "field − linear", "x"],
        ["loss", "field − linear", "v"],
        ["loss", "field − linear", "x"],
    ]
    assert {line[-1] for line in lines} == {"4"}
    panel = [row for row in rows_of(4) if row.choices["prediction"] == "x"]
    assert lines[1][3] == f"{paired(panel, 'head', 'linear', 'field', 'fd').mean:.4g}"
    with pytest.raises(InputError, match="no axis 'size'; its axes: head, prediction"):
        table(rows_of(1), "size")
    with pytest.raises(InputError, match="no two runs that are done differ in head alone"):
        table(rows_of(1)[:2], "head")


def test_any_value_may_be_the_one_that_the_others_are_compared_with():
    rows = rows_of(6)
    rows += [Row(90 + i, {"head": "conv", "prediction": "v"}, str(i), {"fd": 1.0}) for i in range(6)]
    titles, *lines = table([row for row in rows if row.choices["prediction"] == "v"], "head", "field")
    assert [line[1] for line in lines if line[0] == "fd"] == ["linear − field", "conv − field"]
    found = paired([row for row in rows if row.choices["prediction"] == "v"], "head", "field", "linear", "fd")
    assert lines[0][titles.index("difference")] == f"{found.mean:.4g}"
    with pytest.raises(InputError, match="no run that is done has head 'none'; there are linear, field, conv"):
        table(rows, "head", "none")


# --- a tuned axis ----------------------------------------------------------------------------------------------------


def tuned_rows():
    """Seed 0 with two rates, seed 1 with the better one of each head alone; the field's is the larger."""
    errors = {("line", "low", "0"): 1.0, ("line", "high", "0"): 2.0, ("line", "low", "1"): 9.0}
    errors |= {("field", "low", "0"): 3.0, ("field", "high", "0"): 0.5, ("field", "high", "1"): 4.0}
    made = [({"head": head, "rate": rate}, seed, error) for (head, rate, seed), error in errors.items()]
    return [Row(k, choices, seed, {"kid": error, "recall": error}) for k, (choices, seed, error) in enumerate(made)]


def test_best_values_are_chosen_on_shared_seeds_and_pairs_follow():
    rows = tuned_rows()
    best = best_values(rows, "rate", "kid")
    assert best == {("line",): "low", ("field",): "high"}  # by all seeds the line's would be "high": 5.0 against 2.0
    kept = at_best(rows, "rate", best)
    assert [row.choices for row in kept] == [{"head": "line"}] * 2 + [{"head": "field"}] * 2
    found = paired(kept, "head", "line", "field", "kid")
    assert (found.mean, found.pairs) == (((0.5 - 1) + (4 - 9)) / 2, 2)


def test_a_poor_value_with_one_seed_leaves_the_others_seeds_to_decide():
    errors = {"low": [1.0, 5.0, 5.0], "high": [2.0, 3.0, 3.0], "poor": [7.0]}
    rows = [
        Row(0, {"rate": rate}, str(seed), {"kid": error})
        for rate, values in errors.items()
        for seed, error in enumerate(values)
    ]
    assert best_values(rows, "rate", "kid") == {(): "high"}  # by seed 0 alone it would be "low"


def test_rows_without_the_measure_choose_nothing():
    rows = [*tuned_rows(), Row(9, {"head": "line", "rate": "huge"}, "0", {"recall": 0.1})]
    assert best_values(rows, "rate", "kid") == best_values(tuned_rows(), "rate", "kid")


@pytest.mark.parametrize(
    ("rows", "axis", "measure", "said"),
    [
        (tuned_rows(), "rate", "recall", "by is 'recall'; it has to be one of velocity_error"),
        (tuned_rows(), "steps", "kid", "no axis 'steps' to tune; its axes: head, rate"),
        (tuned_rows(), "rate", "fd", "no run of the study that is done has the measure 'fd'"),
        ([row for row in tuned_rows() if row.index != 0], "rate", "kid", "the values high, low of rate share no seed"),
    ],
)
def test_what_cannot_be_tuned_is_named(rows, axis, measure, said):
    with pytest.raises(InputError, match=said):
        best_values(rows, axis, measure)
