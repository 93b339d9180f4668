"""The benchmark: what it counts, that its contestants are equal, whose turn it is. Never how long anything takes."""

import dataclasses
import functools
import json
from collections import namedtuple
from unittest import mock

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from pixnerd import InputError, PixNerd, flow
from pixnerd.bench import clock, contestants, measure, scaling
from pixnerd.bench.clock import Reading, exponent, largest_that_fits, median_and_quartiles, ratios, take_turns
from pixnerd.bench.contestants import Bench, Contestant, check_equal
from pixnerd.bench.counts import Roofs, count_operators, profile_operators
from pixnerd.bench.parts import network_parts
from pixnerd.bench.presets import PRESETS, BenchConfig
from pixnerd.bench.tables import TABLES, parts_table, training_table
from pixnerd.cli import main, parse
from pixnerd.recipes import RECIPES

from .conftest import TINY
from .test_cost import multiply_adds

ROOFS = Roofs(matmul=100.0, copy=10.0)
SMALL = dataclasses.replace(PRESETS["tiny"], precisions=("float32", "bfloat16"))


@pytest.fixture(scope="module")
def bench():
    return Bench(SMALL)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The file and the record of the rehearsal, whose command is run once."""
    file = tmp_path_factory.mktemp("bench") / "tiny.json"
    main(["bench", "tiny", "--rounds", "1", "--out", str(file)])
    return file, measure.read_record(file)


# --- counts ----------------------------------------------------------------------------------------------------------


def test_a_product_computes_and_moves_what_its_sizes_say():
    a, b = torch.ones(2, 3), torch.ones(3, 5)
    counts = count_operators(lambda: a @ b, ROOFS)
    assert (counts.flops, counts.bytes) == (2 * 2 * 3 * 5, 4 * (6 + 15 + 10))
    assert counts.bound_seconds == 4 * 31 / 10  # traffic takes longer than 60 / 100


def test_each_operator_is_bound_by_the_later_of_its_roofs():
    a = torch.ones(8, 8)
    counts = count_operators(lambda: (a @ a).T + 1, Roofs(matmul=1.0, copy=1.0))
    assert counts.bound_seconds == 2 * 8**3 + 4 * (64 + 64)  # the product its arithmetic, the sum its traffic


def test_a_repeated_value_is_read_once():
    row = torch.ones(1, 4).expand(100, 4)
    assert count_operators(lambda: row.contiguous(), ROOFS).bytes == 4 * (4 + 400)


def test_what_is_changed_in_place_is_read_and_written():
    """Also by joined operators, which return nothing; what is only overwritten is not read, and room is not filled."""
    a, b = [torch.ones(8), torch.ones(3)], [torch.ones(8), torch.ones(3)]
    bytes_of = lambda action: count_operators(action, ROOFS).bytes
    assert bytes_of(lambda: a[0].add_(b[0])) == 4 * 3 * 8
    assert bytes_of(lambda: torch._foreach_add_(a, b)) == 4 * 3 * 11
    assert bytes_of(lambda: torch._foreach_mul(a, 2.0)) == 4 * 2 * 11
    assert bytes_of(lambda: torch.add(a[0], b[0], out=torch.empty(8))) == 4 * 3 * 8
    assert bytes_of(lambda: a[0].copy_(b[0])) == 4 * 2 * 8
    assert bytes_of(lambda: a[0].zero_()) == 4 * 8
    assert bytes_of(lambda: torch._foreach_zero_(a)) == 4 * 11
    assert bytes_of(lambda: torch.empty(100)) == bytes_of(lambda: a[0].new_empty_strided((8,), (1,))) == 0
    assert bytes_of(lambda: torch.randn_like(a[0])) == bytes_of(lambda: a[0].new_zeros(8)) == 4 * 8
    assert bytes_of(lambda: a[0].normal_()) == 4 * 8
    weight = nn.Parameter(torch.ones(8))
    weight.grad = torch.ones(8)
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.step()  # makes the moments
    moments_and_all = 4 * 8 * 4 * 2  # weight, two moments and the gradient, which it could unscale
    assert bytes_of(optimizer.step) == moments_and_all + 3 * 4  # the number of steps: read, and read and counted up


def test_a_training_step_multiplies_what_its_sizes_say():
    """Twice the forward pass again, without the gradients of what has none; the fused attention recomputes scores."""
    B, N, K, D, C, W = 3, 16, 16, TINY.width, TINY.channels, TINY.field_width
    image, noise = torch.rand(2, B, C, 16, 16)
    model = PixNerd(TINY, 5, "none")
    action = lambda: flow.loss(model, image, torch.zeros(B).long(), noise, torch.rand(B)).mean.backward()
    once = K * 64 * W  # coordinates: one product for the whole batch
    forward = B * (multiply_adds(TINY, 16) - once) + once
    no_gradient = B * (N * C * K * D + 256 * D + N * K * C * W) + once
    scores = B * TINY.blocks * N * N * D
    assert count_operators(action, ROOFS).flops == 2 * (3 * forward - no_gradient + scores)


def test_exponents_are_those_of_power_laws():
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert exponent([8, 16], [5, 5]) == pytest.approx(0)
    assert exponent([1, 10, 100], [7, 7 * 10**-0.5, 0.7]) == pytest.approx(-0.5)


def test_axes_have_only_values_that_make_a_network():
    found = scaling.points(dataclasses.replace(SMALL, factors=(0.5, 1.0, 1.5, 2.0), batch_size=1))
    assert {axis: list(values) for axis, values in found.items()} == {
        "image_size": [8, 16, 24, 32],
        "patch_size": [2, 4, 8],  # 6 does not divide 16
        "width": [8, 16, 24, 32],
        "batch_size": [1, 2],
    }
    assert found["image_size"][32].model.image_size == 32
    assert found["batch_size"][2] == (SMALL.model, 2)
    assert not scaling.points(dataclasses.replace(SMALL, factors=(1.0,)))


def test_what_does_not_fit_is_left_out_and_loses_nothing(monkeypatch, tmp_path):
    """Networks around the given batch, whatever the largest is; a record of everything else is there before them."""
    out, sizes = tmp_path / "x.json", []

    def action_of(point, *_):
        if point.model.width > 16:  # not even the weights fit
            raise torch.OutOfMemoryError

        def action():
            sizes.append(point.batch_size)
            assert measure.read_record(out)["parts"]
            if point.model.image_size > 16 or point.model.patch_size != 4:
                raise torch.OutOfMemoryError
            torch.ones(point.batch_size * point.model.width) @ torch.ones(point.batch_size * point.model.width)

        return action

    monkeypatch.setattr(scaling, "gradient_action", action_of)
    monkeypatch.setattr(measure, "find_largest", lambda bench: 8)
    config = dataclasses.replace(SMALL, largest=True, precisions=("float32",), compile=("off",), rounds=1)
    record = measure.run_benchmark(config, "x", "", out)
    assert {axis: [row["value"] for row in found["rows"]] for axis, found in record["scaling"].items()} == {
        "image_size": [8, 16],
        "width": [8, 16],
        "batch_size": [2, 4, 8],
    }
    assert (record["config"]["batch_size"], record["scaling_batch"]) == (8, 4)
    assert set(sizes) == {2, 4, 8}


def test_operators_are_not_counted_again_with_their_kernels(monkeypatch):
    """On a GPU a profile has rows of both."""
    Event = namedtuple("Event", "key count device_type self_device_time_total self_cpu_time_total")
    kinds = torch.autograd.DeviceType
    events = [Event("aten::mm", 6, kinds.CPU, 3e6, 1.0), Event("sgemm", 6, kinds.CUDA, 3e6, 0.0)]
    profile = mock.MagicMock()
    profile.return_value.__enter__.return_value.key_averages.return_value = events
    monkeypatch.setattr(torch.profiler, "profile", profile)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert profile_operators(lambda: None) == [{"operator": "aten::mm", "calls": 2, "seconds": 1.0, "share": 1.0}]


@pytest.mark.parametrize("limit", [0, 1, 5, 32, 33, 100, 257])
def test_the_largest_batch_that_fits_is_found(limit):
    tried = []

    def fits(images):
        tried.append(images)
        return images <= limit

    found = largest_that_fits(fits, 32)
    assert found <= limit <= found + max(1, found // 16)
    assert min(tried) >= 1
    assert len(tried) < 16


# --- the clock -------------------------------------------------------------------------------------------------------


def test_contestants_take_turns_and_each_begins_a_round():
    said = []
    actions = {name: lambda name=name: said.append(name) for name in "abc"}
    readings = take_turns(actions, rounds=3, before_round=lambda: said.append("|"), warm=1)
    assert "".join(said) == "|abc|bca|cab|abc"
    assert {name: len(found) for name, found in readings.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_reading_is_what_passed_on_both_clocks(monkeypatch):
    now = {"wall": 0.0, "processor": 0.0}
    monkeypatch.setattr(clock, "clock", lambda: now["wall"])
    monkeypatch.setattr(clock.time, "process_time", lambda: now["processor"])

    def work():
        now["wall"] += 3
        now["processor"] += 2

    assert take_turns({"work": work}, 2, warm=0) == {"work": [Reading(3, 2)] * 2}


def test_ratios_are_of_the_same_round():
    """A round in which the machine was busy counts for both."""
    mine, plain = [Reading(1, 2), Reading(10, 2), Reading(2, 2)], [Reading(2, 4), Reading(20, 8), Reading(4, 8)]
    assert ratios(mine, plain)["wall"] == (0.5, 0.5, 0.5)
    assert ratios(mine, plain)["processor"].median == 0.25
    assert median_and_quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (3, 2, 4)


# --- the contestants -------------------------------------------------------------------------------------------------


def test_contestants_share_weights_and_batch_and_agree(bench):
    """But for rounding in float32, and roughly in bfloat16; the linear one shares the transformer."""
    package, plain, linear = (bench.network(Contestant(k, "float32", False)) for k in ("package", "plain", "linear"))
    ours, theirs, others = (dict(network.named_parameters()) for network in (package, plain, linear))
    assert all(ours[name] is theirs[name] for name in ours | theirs)
    assert all(weight is ours[name] for name, weight in others.items() if not name.startswith("head."))
    assert all(weight.any() for weight in (*ours.values(), *others.values()))
    assert linear.config == dataclasses.replace(package.config, head="linear")
    for contestant in contestants.contestants(bench.config):
        difference = bench.difference(contestant, bench.network(contestant))
        check_equal(contestant, difference)
        assert 0 < difference < (1e-4 if contestant.precision == "float32" else 0.1)


def test_every_benchmark_begins_with_the_same_weights():
    """Whatever was drawn before in its process."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(Bench(SMALL).weights)
    for kind, model in found[0].items():
        other = found[1][kind].state_dict()
        assert all(torch.equal(weight, other[name]) for name, weight in model.state_dict().items())


def test_contestants_have_the_same_gradients_and_leave_the_same_weights(bench):
    """And the step of each is one of the package's loop: gradient, optimiser, average."""
    found = {}
    for kind, recompute in (("package", "none"), ("package", "all"), ("plain", "none")):
        contestant = Contestant(kind, "float32", False, recompute)
        network = bench.network(contestant)
        bench.gradient(contestant, network)()
        found[kind, recompute] = {name: p.grad.clone() for name, p in network.named_parameters()}
    first = found["plain", "none"]
    largest = max(float(gradient.abs().max()) for gradient in first.values())
    for gradients in found.values():
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, first[name], rtol=1e-3, atol=1e-5 * largest)
    contestant, state = Contestant("plain", "float32", False), bench.states["plain"]
    before = {name: weight.clone() for name, weight in bench.weights["package"].state_dict().items()}
    average = state.models["ema"].patch_embed.weight.clone()
    bench.training_step(contestant, bench.network(contestant))()
    after = bench.weights["package"].state_dict()
    assert all(0 < (after[name] - before[name]).abs().max() < 1e-5 for name in before if name != "label_embed.weight")
    assert not torch.equal(average, state.models["ema"].patch_embed.weight)


def test_a_contestant_that_computes_something_else_is_refused(bench, monkeypatch):
    contestant = Contestant("package", "float32", False)
    monkeypatch.setattr(contestants.plain, "silu", lambda x: x * torch.sigmoid(1.001 * x))
    with pytest.raises(RuntimeError, match="package, float32, eager differs"):
        check_equal(contestant, bench.difference(contestant, bench.network(contestant)))
    with pytest.raises(RuntimeError, match="differs"):
        check_equal(contestant, float("nan"))


@pytest.mark.parametrize(("guided", "passes"), [(False, 1), (True, 2)])
def test_an_evaluation_shows_the_network_each_image_once_or_twice(bench, guided, passes):
    contestant, seen = Contestant("package", "float32", False), []
    network = bench.network(contestant).eval()
    network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    assert bench.evaluation(contestant, network, 3, guided)().shape == (3, 3, 16, 16)
    assert seen == [3 * passes]


def test_parts_compute_what_the_step_computes(bench):
    """The products of embedding, blocks and head are those of the whole gradient, but for the gradient of the image."""
    contestant = Contestant("package", "float32", False)
    network = bench.network(contestant)
    flops = {n: count_operators(a, ROOFS).flops for n, a in network_parts(network, bench.batch, False).items()}
    whole = count_operators(bench.gradient(contestant, network), ROOFS).flops
    assert flops["embedding"] + flops["blocks"] + flops["head"] == whole
    c = bench.config
    M, made = c.batch_size * 16, 2 * c.model.field_width * 2 * c.model.field_width
    assert flops["weight generation"] == 3 * 2 * M * c.model.width * made


# --- the record ------------------------------------------------------------------------------------------------------


def test_a_record_is_read_back_and_says_where_it_is_from(recorded):
    file, record = recorded
    assert {"name", "command", "pixnerd", "commit", "torch", "machine", "threads", "device", "config"} <= record.keys()
    again = parse(record["command"].split()[1:])
    assert again.config == dataclasses.replace(PRESETS["tiny"], rounds=1)
    assert BenchConfig(**_config(record)) == again.config
    assert json.loads(file.read_text()) == record


def _config(record):
    entries = {name: tuple(v) if isinstance(v, list) else v for name, v in record["config"].items()}
    return entries | {"model": type(SMALL.model)(**entries["model"])}


def test_a_record_has_every_contestant_and_every_way_to_sample(recorded):
    _, record = recorded
    named = [(row["kind"], row["recompute"]) for row in record["training"]]
    assert named == [*(("package", r) for r in ("none", "head", "all")), ("plain", "none"), ("linear", "none")]
    ways = [(row["images"], row["guided"], row["kind"]) for row in record["sampling"]]
    assert ways == [(n, g, k) for n in (1, 4) for g in (False, True) for k in ("package", "plain", "linear")]
    none, head, everything, plain, _ = (row["saved_bytes"] for row in record["training"])
    assert plain > none > head > everything > 0
    flops = [row["flops"] for row in record["training"]]
    assert flops[0] < flops[1] < flops[2]  # what is recomputed counts
    for row in record["training"]:
        rate = record["roofs"]["float32"]["matmul"]
        assert row["utilisation"] == pytest.approx(row["flops"] / row["seconds"] / rate)
        assert row["bound_seconds"] >= row["flops"] / rate
    assert all(row["of_plain"]["wall"]["median"] == 1 for row in record["training"] if row["kind"] == "plain")
    assert set(record["scaling"]) == {"image_size", "patch_size", "width", "batch_size"}
    assert record["scaling"]["batch_size"]["exponents"]["saved_bytes"] == pytest.approx(1)


def test_tables_have_every_row_as_wide_as_their_titles(recorded):
    _, record = recorded
    for table in TABLES.values():
        titles, *rows = table(record)
        assert rows
        assert all(len(row) == len(titles) for row in rows)
    assert [row[0] for row in training_table(record)[1:]] == ["package", "package", "package", "plain", "linear"]


def test_parts_add_up_to_the_step():
    times = {"step": 10, "input": 2, "gradient": 8, "embedding": 1, "blocks": 3, "head": 4, "weight generation": 1.5}
    rows = [{"part": name, "seconds": value / 1e3, "processor_seconds": value / 2e3} for name, value in times.items()]
    found = {row[0]: row[1:] for row in parts_table({"parts": {"rows": rows}})}
    assert found["field"] == ["2.5", "20.8%", "1.25", "20.8%"]
    assert found["rest"] == ["2", "16.7%", "1", "16.7%"]
    assert found["step and input"] == ["12", "100.0%", "6", "100.0%"]
    assert "head" not in found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["huge"], "benchmark 'huge' is unknown; known benchmarks: tiny, digits"),
        (["tiny", "--rounds", "0"], "rounds is 0; it has to be at least 1"),
        (["tiny", "--recipe", "magic"], "recipe 'magic' is unknown"),
        (["tiny", "--recipe", "text-256"], "class-conditional networks; this one reads captions"),
        (["tiny", "--model.student"], "model.student is True"),
        (["tiny", "--data", "nothing"], "nothing"),
        (["tiny", "--model.patch-size", "5"], "multiples of 5"),
    ],
    ids=" ".join,
)
def test_bad_input_ends_with_a_sentence(arguments, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments, "--out", str(tmp_path / "x.json")])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks for the largest batch")
def test_the_largest_batch_needs_a_gpu(tmp_path):
    with pytest.raises(InputError, match="largest is True"):
        measure.run_benchmark(dataclasses.replace(SMALL, largest=True), "x", "", tmp_path / "x.json")


def test_the_peak_is_what_a_step_needs_beyond_what_is_there(monkeypatch):
    """As a GPU's counters would say."""
    memory = {"now": 100, "peak": 500}  # 500 of something before
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: memory["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: memory.update(peak=memory["now"]))
    assert measure.peak_bytes(lambda: memory.update(peak=130)) == 30


@pytest.mark.parametrize("name", ["precisions", "compile", "recompute", "kernels"])
def test_nothing_to_measure_is_refused(name):
    with pytest.raises(InputError, match=f"{name} is empty"):
        dataclasses.replace(SMALL, **{name: ()})


def test_another_file_is_no_record(tmp_path):
    (tmp_path / "x.json").write_text('{"training": []}')
    with pytest.raises(InputError, match="has no sampling, parts, operators, scaling"):
        measure.read_record(tmp_path / "x.json")


def test_a_record_of_an_earlier_version_is_refused(tmp_path, recorded):
    """One that says nothing of kernels, which its tables would need."""
    _, record = recorded
    rows = [{name: value for name, value in row.items() if name != "kernel"} for row in record["training"]]
    (tmp_path / "x.json").write_text(json.dumps(record | {"training": rows}))
    with pytest.raises(InputError, match=r"x\.json was written by an earlier version of the benchmark: run it again"):
        measure.read_record(tmp_path / "x.json")


def test_both_kernels_are_compared_on_a_gpu():
    """But for the head in pieces, which the fused kernel does not have."""
    found = contestants.contestants(dataclasses.replace(PRESETS["xl16"], compile=("on",)))
    ways = [(one.recompute, one.kernel) for one in found if one.kind == "package"]
    assert ways == [("none", "fused"), ("none", "torch"), ("head", "torch"), ("all", "fused"), ("all", "torch")]
    assert all((one.kernel, one.recorded) == ("torch", False) for one in found if one.kind != "package")
    with pytest.raises(InputError, match="field_kernel is fused and model.head is linear"):
        dataclasses.replace(PRESETS["xl16"], model=dataclasses.replace(TINY, head="linear"))


def test_the_plain_networks_compiled_parts_are_one_graph_each():
    """Whatever the number of blocks, as the package's."""
    config = dataclasses.replace(TINY, blocks=3)
    network = contestants.PlainNetwork(config, 5)
    given = torch.randn(2, TINY.channels, 16, 16), torch.rand(2), torch.arange(2)
    expected, counter = network(*given), CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    with mock.patch("torch.compile", functools.partial(torch.compile, backend=counter)):
        network.compile_parts()
    torch.testing.assert_close(network(*given), expected)
    assert counter.frame_count == 2


def test_the_quickstarts_network_is_measured_as_it_trains():
    run = PRESETS["digits"].training("float32", "none")
    kept = ("model", "data", "batch_size", "clip", "betas", "ema_decay", "time_shift", "label_dropout", "noise")
    assert all(getattr(run, name) == getattr(RECIPES["digits-cpu"], name) for name in kept)
