"""Whether the digits' training step gains by compiling the whole network: python -m tests.measure.whole_graph

As `compile_regions` does it, a block and the head each by itself; as one graph; and as one graph in which a block is a
region that torch compiles once. For each: the gradient's largest difference from the eager plain network's, of its
norm, parameter by parameter; seconds to the first step with an empty cache, and with this one's files in it; and the
median step, in turns, of the eager plain network's in float32. What torch does not compile, or computes wrong
gradients, is not timed.
"""

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from pixnerd import fields, model
from pixnerd.bench.clock import take_turns
from pixnerd.bench.contestants import LATEST, Bench, Contestant
from pixnerd.bench.presets import PRESETS
from pixnerd.data.prepared import machine
from pixnerd.layers import DiTBlock
from pixnerd.model import PixNerd

WAYS = ("regions", "whole", "nested")
ROUNDS = 31


@contextlib.contextmanager
def constant_tables() -> Iterator[None]:
    """A graph keeps the tables of positions, which are cached, instead of tracing what computes them."""
    rotary, coordinates = model.rotary_table, fields.coordinate_table
    with (
        mock.patch.object(model, "rotary_table", torch.compiler.assume_constant_result(lambda *a: rotary(*a))),
        mock.patch.object(
            fields, "coordinate_table", torch.compiler.assume_constant_result(lambda *a: coordinates(*a))
        ),
    ):
        yield


class Region(DiTBlock):
    """A block that torch compiles once within the graph of a network."""

    forward = torch.compiler.nested_compile_region(DiTBlock.forward)


def compiled(bench: Bench, contestant: Contestant, way: str) -> PixNerd:
    """A contestant's network, compiled one of the ways."""
    network = bench.network(contestant, compiled=way == "regions")
    if way == "nested":
        for block in network.blocks:
            block.__class__ = Region
    if way != "regions":
        network.denoise = torch.compile(network.denoise, dynamic=False, fullgraph=True)
    return network


def gradients(bench: Bench, network: PixNerd, bf16: bool) -> list[Tensor]:
    """Of the mean square of the velocities."""
    batch = bench.batch
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        v = network(batch.image, batch.t.clamp(max=LATEST), batch.condition)
    return list(torch.autograd.grad(v.square().mean(), list(network.parameters())))


def worst(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((one - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True))


def first_step(way: str, precision: str) -> None:
    """In a process of its own: print the seconds that the first step takes."""
    bench, contestant = Bench(PRESETS["digits"]), Contestant("package", precision, True)
    step = bench.training_step(contestant, compiled(bench, contestant, way))
    begin = time.perf_counter()
    step()
    print(f"{time.perf_counter() - begin:.1f}")


def seconds_to_first_step(way: str, precision: str) -> list[str]:
    """With an empty cache, and again."""
    command = [sys.executable, "-m", "tests.measure.whole_graph", way, precision]
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict("os.environ", TORCHINDUCTOR_CACHE_DIR=cache):
        return [subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for _ in range(2)]


def compare(precision: str) -> None:
    bench = Bench(PRESETS["digits"])
    reference = Contestant("plain", "float32", False)
    network = bench.network(reference)
    exact, steps = gradients(bench, network, False), {"plain": bench.training_step(reference, network)}
    contestant = Contestant("package", precision, True)
    for way in WAYS:
        torch._dynamo.reset()
        network = compiled(bench, contestant, way)
        try:
            error = worst(gradients(bench, network, precision == "bfloat16"), exact)
        except torch._dynamo.exc.TorchDynamoException as problem:
            print(f"{precision}, {way}: torch does not compile it: {problem.args[0].splitlines()[2]}", flush=True)
            continue
        print(f"{precision}, {way}: gradients differ by {error:.2g}", flush=True)
        if error < 0.1:
            took = seconds_to_first_step(way, precision)
            print(f"{precision}, {way}: {', again '.join(took)} s to the first step", flush=True)
            steps[way] = bench.training_step(contestant, network)
    readings = take_turns(steps, ROUNDS, bench.next_batch)
    medians = {way: statistics.median(reading.wall for reading in found) for way, found in readings.items()}
    for way, seconds in medians.items():
        print(f"{precision}, {way}: {1000 * seconds:.1f} ms, {seconds / medians['plain']:.3f}", flush=True)


def main() -> None:
    with constant_tables():
        if len(sys.argv) == 3:
            first_step(*sys.argv[1:])
            return
        print(f"{machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        for precision in ("float32", "bfloat16"):
            compare(precision)


if __name__ == "__main__":
    main()
