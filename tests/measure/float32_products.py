"""What oneDNN gains over MKL in float32 on this processor: python -m tests.measure.float32_products

Layers of the digits' network and of L/16, with the rows that they have in a step of 64 digits or of one image of 256
pixels: oneDNN's time of MKL's for the output and for both gradients; then whole training steps of both networks, eager
and compiled. Medians, in turns, in one run.
"""

import functools
import statistics
from collections.abc import Callable

import torch

from pixnerd import linear as module
from pixnerd.bench.clock import take_turns
from pixnerd.bench.contestants import Bench, Contestant
from pixnerd.bench.measure import separate_graphs
from pixnerd.bench.presets import PRESETS
from pixnerd.data.prepared import machine

LAYERS = {  # rows, inputs, outputs
    "digits: queries, keys, values": (1024, 128, 384),
    "digits: SwiGLU, gate and value": (1024, 128, 682),
    "digits: SwiGLU, out": (1024, 341, 128),
    "digits: a field's weights": (1024, 128, 1024),
    "L/16: queries, keys, values": (256, 1024, 3072),
    "L/16: SwiGLU, gate and value": (256, 1024, 5460),
    "L/16: SwiGLU, out": (256, 2730, 1024),
    "L/16: a field's weights": (256, 1024, 16384),
}
WAYS = {"MKL": False, "oneDNN": True}


def with_products_of(way: str, work: Callable[[], object]) -> Callable[[], object]:
    """The work, its linear layers by MKL or by oneDNN."""

    def switched() -> None:
        module.BY_ONEDNN = WAYS[way]
        work()

    return switched


def ratio(work: dict[str, Callable[[], object]], rounds: int) -> tuple[float, float]:
    """The median seconds of MKL's, and oneDNN's of them."""
    readings = take_turns({way: with_products_of(way, work[way]) for way in WAYS}, rounds)
    by_mkl, by_onednn = (statistics.median(reading.wall for reading in readings[way]) for way in WAYS)
    return by_mkl, by_onednn / by_mkl


def products(rows: int, inputs: int, outputs: int) -> dict[str, dict[str, Callable[[], object]]]:
    """A layer's output, and the gradients of what it is computed from, each both ways."""
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    gradient, parts = torch.randn(rows, outputs), {"output": dict.fromkeys(WAYS, lambda: module.linear(x, weight))}
    for name, place in (("gradient of x", 0), ("of the weights", 1)):
        operands = [x, weight]
        leaf = operands[place] = operands[place].detach().requires_grad_()
        parts[name] = {}
        for way, module.BY_ONEDNN in WAYS.items():
            out = module.linear(*operands)
            parts[name][way] = functools.partial(torch.autograd.grad, out, leaf, gradient, retain_graph=True)
    return parts


def main() -> None:
    print(f"{machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; float32")
    for name, (rows, inputs, outputs) in LAYERS.items():
        for of, work in products(rows, inputs, outputs).items():
            seconds, relative = ratio(work, 30)
            speed = 2 * rows * inputs * outputs / seconds / 1e9
            print(f"{name:32}{of:16}{speed:6.0f} GFLOP/s by MKL; {relative:.2f} of its time", flush=True)
    for name, rounds in (("digits", 15), ("l-short", 7)):
        bench = Bench(PRESETS[name])
        for compiled in (False, True):
            contestant, work = Contestant("package", "float32", compiled), {}
            with separate_graphs():
                for way in WAYS:
                    work[way] = bench.training_step(contestant, bench.network(contestant))
                seconds, relative = ratio(work, rounds)
            how = "compiled" if compiled else "eager"
            print(f"{name}, a step, {how}: {1000 * seconds:.1f} ms by MKL; {relative:.2f} of its time", flush=True)


if __name__ == "__main__":
    main()
