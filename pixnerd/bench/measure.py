"""The benchmark from top to bottom: what is measured, the record that is written, and its tables."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import cost
from ..errors import InputError
from ..files import check_output_file, read_json, write_atomically
from ..surroundings import surroundings
from .clock import Reading, largest_that_fits, median_and_quartiles, ratios, take_turns
from .contestants import Bench, Contestant, check_equal, contestants
from .counts import Counts, Roofs, count_operators, profile_operators
from .parts import step_parts
from .presets import BenchConfig
from .scaling import measure_scaling

RECORDS = Path("data/benchmarks")
TRIALS = 3  # of measuring what the device can do at best
OPERATORS = 20  # of the profile are kept
SECTIONS = ("training", "sampling", "parts", "operators", "scaling")


def run_benchmark(config: BenchConfig, name: str, command: str, out: Path | None = None) -> dict[str, Any]:
    """Measure everything and write data/benchmarks/NAME.json, or `out`; returns what was written.

    Raises:
        InputError: before anything is measured, if data, device or compiler do not allow it.
        WriteError: the file could not be written.
        RuntimeError: a contestant computes something else than the others.
    """
    out = out or RECORDS / f"{name}.json"
    check_output_file(out)
    bench, given = Bench(config), config.batch_size
    if config.largest:
        config = bench.config = dataclasses.replace(bench.config, batch_size=find_largest(bench))
        bench.batches = bench.new_batches()
        bench.next_batch()
    rates = roofs_of(bench)
    record = {"name": name, "command": command, **surroundings(), "config": dataclasses.asdict(bench.config)}
    record["roofs"] = {precision: roofs._asdict() for precision, roofs in rates.items()}
    with separate_graphs():
        record["training"] = measure_training(bench, rates)
    with separate_graphs():
        record["sampling"] = measure_sampling(bench)
    record |= measure_parts(bench)
    first = rates[config.precisions[0]]
    _write(record | {"scaling": {}}, out)  # a larger network may be too large for the device: that loses nothing
    around = dataclasses.replace(bench.config, batch_size=min(given, config.batch_size))  # twice the largest: too many
    record["scaling_batch"] = around.batch_size
    record["scaling"] = measure_scaling(around, bench.conditions.num_classes, bench.world.device, first)
    _write(record, out)
    return record


def _write(record: dict[str, Any], out: Path) -> None:
    write_atomically(out, json.dumps(record, indent=1) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """A benchmark's record. Raises InputError if the file is missing, is none, or is an earlier version's."""
    record = read_json(path, "a benchmark")
    if missing := [section for section in SECTIONS if section not in record]:
        raise InputError(f"{path} is no record of a benchmark: it has no {', '.join(missing)}")
    if any(field.name not in row for row in record["training"] for field in dataclasses.fields(Contestant)):
        raise InputError(f"{path} was written by an earlier version of the benchmark: run it again")
    return record


@contextmanager
def separate_graphs() -> Iterator[None]:
    """torch.compile makes a graph for each shape and contestant, none shared with what was measured before."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=256, automatic_dynamic_shapes=False):
        yield
    torch._dynamo.reset()


def roofs_of(bench: Bench) -> dict[str, Roofs]:
    """What this device can do at best, by precision; the best of several trials, since others may use it as well."""
    device, kinds = bench.world.device, {"float32": torch.float32, "bfloat16": torch.bfloat16}
    copied = max(cost.copy_rate(device) for _ in range(TRIALS))
    matmul = {p: max(cost.matmul_rate(device, kinds[p]) for _ in range(TRIALS)) for p in bench.config.precisions}
    return {precision: Roofs(rate, copied) for precision, rate in matmul.items()}


# --- the sections ----------------------------------------------------------------------------------------------------


def measure_training(bench: Bench, rates: dict[str, Roofs]) -> list[dict[str, Any]]:
    """A whole training step of every contestant, in turns, with what it computes, moves and keeps."""
    networks = {contestant: bench.network(contestant) for contestant in contestants(bench.config)}
    differences = {contestant: bench.difference(contestant, network) for contestant, network in networks.items()}
    for contestant, difference in differences.items():
        check_equal(contestant, difference)
    counts = count_contestants(bench, rates)
    steps = {contestant: bench.training_step(contestant, network) for contestant, network in networks.items()}
    readings = take_turns(steps, bench.config.rounds, bench.next_batch)
    rows = []
    for contestant in networks:
        row = row_of(contestant, readings[contestant], reference(readings, contestant), bench.config.batch_size)
        row |= {"difference": differences[contestant], "saved_bytes": saved_bytes(bench, contestant)}
        eager = counts[dataclasses.replace(contestant, compiled=False)]
        row |= eager._asdict()
        row["utilisation"] = eager.flops / row["seconds"] / rates[contestant.precision].matmul
        row["traffic_utilisation"] = eager.bytes / row["seconds"] / rates[contestant.precision].copy
        if bench.world.device.type == "cuda":
            row["peak_bytes"] = peak_bytes(steps[contestant])
        rows.append(row)
    return rows


def count_contestants(bench: Bench, rates: dict[str, Roofs]) -> dict[Contestant, Counts]:
    """FLOPs and traffic of a step of every contestant without torch.compile, whose kernels cannot be looked into."""
    found = {}
    for contestant in dict.fromkeys(dataclasses.replace(c, compiled=False) for c in contestants(bench.config)):
        step = bench.training_step(contestant, bench.network(contestant))
        step()  # the first one makes tables and the optimiser's moments
        found[contestant] = count_operators(step, rates[contestant.precision])
    return found


def measure_sampling(bench: Bench) -> list[dict[str, Any]]:
    """One evaluation while sampling, of one image and of a batch, unguided and guided, all in turns."""
    chosen = [c for c in contestants(bench.config) if c.recompute == bench.config.recompute[0] or c.kind != "package"]
    on_gpu = bench.world.device.type == "cuda"
    recorded = [dataclasses.replace(c, recorded=True) for c in chosen if on_gpu and c.kind == "package"]
    networks = {contestant: bench.network(contestant).eval() for contestant in chosen + recorded}
    ways = [(images, guided) for images in sorted({1, bench.config.batch_size}) for guided in (False, True)]
    rows = []
    for images, guided in ways:
        actions = {
            c: bench.evaluation(c, network, images, guided)
            for c, network in networks.items()
            if images == 1 or not c.recorded  # larger batches are not recorded
        }
        readings = take_turns(actions, bench.config.rounds)
        for contestant in actions:
            row = row_of(contestant, readings[contestant], reference(readings, contestant), images)
            rows.append({"images": images, "guided": guided, **row})
    return rows


def measure_parts(bench: Bench) -> dict[str, Any]:
    """The parts of the first contestant's step, eager, and its operators by a profile."""
    first = dataclasses.replace(contestants(bench.config)[0], compiled=False, recompute="none")
    actions = step_parts(bench, first, bench.network(first))
    readings = take_turns(actions, bench.config.rounds)
    walls = {name: median_and_quartiles([reading.wall for reading in found]) for name, found in readings.items()}
    processor = {
        name: median_and_quartiles([reading.processor for reading in found]) for name, found in readings.items()
    }
    rows = [
        {
            "part": name,
            "seconds": walls[name].median,
            "processor_seconds": processor[name].median,
            **quartiles(walls[name]),
        }
        for name in walls
    ]
    operators = profile_operators(actions["step"])
    return {"parts": {"contestant": str(first), "rows": rows}, "operators": operators[:OPERATORS]}


def reference(readings: dict[Contestant, list[Reading]], contestant: Contestant) -> list[Reading]:
    """The plain network's readings in the same precision, compiled or not likewise."""
    return readings[Contestant("plain", contestant.precision, contestant.compiled)]


def quartiles(found: Any) -> dict[str, float]:
    return {"low": found.low, "high": found.high}


def row_of(contestant: Contestant, readings: list[Reading], plain: list[Reading], images: int) -> dict[str, Any]:
    """Times of a contestant, absolute and of the plain network's."""
    wall, processor = (median_and_quartiles([reading[clock] for reading in readings]) for clock in (0, 1))
    return {
        **dataclasses.asdict(contestant),
        "seconds": wall.median,
        **quartiles(wall),
        "processor_seconds": processor.median,
        "images_per_second": images / wall.median,
        "of_plain": {clock: found._asdict() for clock, found in ratios(readings, plain).items()},
        "readings": [list(reading) for reading in readings],
    }


# --- memory ----------------------------------------------------------------------------------------------------------


def saved_bytes(bench: Bench, contestant: Contestant) -> int:
    """What a training step keeps of an image for its backward pass, by the package's own count for eager operators."""
    network = bench.network(contestant, compiled=False)
    dtype = torch.bfloat16 if contestant.precision == "bfloat16" else torch.float32
    return cost.saved_activation_bytes(network, bench.config.model.image_size, contestant.recompute, dtype)


def peak_bytes(step: Callable[[], None]) -> int:
    """What a step needs on a GPU at its peak, beyond weights, moments and averages."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def find_largest(bench: Bench) -> int:
    """The largest batch with which every contestant's training step fits the GPU. Raises InputError without a GPU."""
    if bench.world.device.type != "cuda":
        raise InputError("largest is True; the largest batch that fits is looked for on a GPU, and torch finds none")
    given = bench.config

    def fits(images: int) -> bool:
        bench.config = dataclasses.replace(given, batch_size=images)
        bench.batches = bench.new_batches()
        try:
            bench.next_batch()
            for contestant in contestants(dataclasses.replace(given, compile=("off",))):
                bench.training_step(contestant, bench.network(contestant))()
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    return largest_that_fits(fits, given.batch_size)
