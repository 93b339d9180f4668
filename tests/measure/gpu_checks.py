"""On a GPU, for real: what the tests show with fake tensors and several processes of a CPU.

python -m tests.measure.gpu_checks

Writes data/benchmarks/gpu_checks.json; ends with 1 if a check failed, and with 2 where there is no GPU.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

from pixnerd import SIZES, PixNerd, flow
from pixnerd.config import TrainConfig
from pixnerd.cost import saved_activation_bytes
from pixnerd.files import write_atomically
from pixnerd.layers import RMSNorm
from pixnerd.training import draw_step, loop, train

OUT = Path("data/benchmarks/gpu_checks.json")
GPU, CPU = torch.device("cuda"), torch.device("cpu")
CONFIG = TrainConfig(
    data="synthetic",
    model=dataclasses.replace(SIZES["small/8"], image_size=64),
    steps=8,
    batch_size=16,
    noise="philox",
    clip=1.0,
    horizontal_flip=True,
    log_every=100,
    checkpoint_every=100,
)


def step_without_waiting(folder: Path) -> dict[str, Any]:
    """A step's gradients and update raise if the CPU waits for the GPU; the first steps compile and make tables."""
    compute, update, waited = loop.compute_gradients, loop.update_weights, []

    def watched(function: Callable) -> Callable:
        def call(job, state, *batch):
            torch.cuda.set_sync_debug_mode("error" if 2 <= state.step < CONFIG.steps - 1 else "default")
            try:
                return function(job, state, *batch)
            except RuntimeError as error:
                waited.append(str(error).splitlines()[0])
                raise
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    loop.compute_gradients, loop.update_weights = watched(compute), watched(update)
    try:
        steps = sum(1 for _ in train(dataclasses.replace(CONFIG, out=str(folder / "sync")), GPU))
    except RuntimeError:
        steps = 0
    finally:
        loop.compute_gradients, loop.update_weights = compute, update
    return {"passed": steps == CONFIG.steps, "waited": waited}


def drawing_without_waiting(folder: Path) -> dict[str, Any]:
    """Draws do not wait either, and are those of a CPU bit for bit."""
    draw_step(CONFIG, 0, range(8), (3, 256, 256), GPU)  # makes the table
    torch.cuda.set_sync_debug_mode("error")
    try:
        draws = draw_step(CONFIG, 3, range(8), (3, 256, 256), GPU)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = draw_step(CONFIG, 3, range(8), (3, 256, 256), CPU)
    equal = {name: getattr(draws, name).cpu().equal(getattr(expected, name)) for name in draws._fields}
    return {"passed": all(equal.values()), "equal": equal}


def resuming(folder: Path) -> dict[str, Any]:
    """Stopped after three steps and resumed: losses and every file of the last checkpoint, bit for bit."""
    losses, files = {}, {}
    for name, stops in (("straight", (None,)), ("resumed", (3, None))):
        config, losses[name] = dataclasses.replace(CONFIG, out=str(folder / name)), []
        for stop in stops:
            for record in train(config, GPU):
                losses[name].append(float(record.loss))
                if record.step == stop:
                    break
        checkpoint = folder / name / "checkpoints" / f"step-{CONFIG.steps}"
        files[name] = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    differ = [name for name, content in files["straight"].items() if files["resumed"][name] != content]
    return {"passed": losses["straight"] == losses["resumed"] and not differ, "differ": differ, "losses": losses}


def norms(folder: Path) -> dict[str, Any]:
    """Under autocast norms read and write bfloat16, and differ from float32's by that rounding alone."""
    norm = RMSNorm(1152).to(GPU)
    x = torch.randn(512, 1152, device=GPU).bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        found = norm(x)
    exact = norm(x.float())
    error = ((found.float() - exact).abs() / exact.abs().clamp_min(1e-6)).max().item()
    return {"passed": found.dtype == torch.bfloat16 and error <= 2**-8, "dtype": str(found.dtype), "error": error}


def compiled_graphs(folder: Path) -> dict[str, Any]:
    """Two graphs and no break, for every policy, with the inductor."""
    found = {}
    for recompute in ("none", "head", "all"):
        torch._dynamo.reset()
        counters.clear()
        with mock.patch.object(loop, "check_compiler"):  # its trial is a graph of its own
            for _ in train(dataclasses.replace(CONFIG, out=str(folder / recompute), recompute=recompute), GPU):
                pass
        found[recompute] = [counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())]
    return {"passed": all(counts == [2, 0] for counts in found.values()), "graphs and breaks": found}


def memory(folder: Path) -> dict[str, Any]:
    """Bytes that a third image of 256 pixels keeps, against the count, for two blocks of L/16; MiB."""
    found, config = {}, dataclasses.replace(SIZES["L/16"], blocks=2)
    for recompute in ("none", "head", "all"):
        model = PixNerd(config, 10, recompute).to(GPU).train()
        kept = []
        for images in (1, 2, 3):
            storages = set()
            with (
                saved_tensors_hooks(lambda y, seen=storages: seen.add(y.untyped_storage()) or y, lambda y: y),
                torch.autocast("cuda", torch.bfloat16),
            ):
                image, t = torch.randn(images, 3, 256, 256, device=GPU), torch.rand(images, device=GPU)
                loss = flow.loss(model, image, model.example_condition(images), torch.randn_like(image), t).mean
            kept.append(sum(storage.nbytes() for storage in storages))
            del loss
        found[recompute] = [(kept[2] - kept[1]) / 2**20, saved_activation_bytes(model, 256) / 2**20]
    passed = all(abs(measured - counted) < 0.05 * counted + 4 for measured, counted in found.values())
    return {"passed": passed, "measured and counted": found}


CHECKS = (norms, drawing_without_waiting, step_without_waiting, resuming, compiled_graphs, memory)


def main() -> None:
    if not torch.cuda.is_available():
        print("These checks need a GPU, and torch finds none here.", file=sys.stderr)
        sys.exit(2)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    results: dict[str, Any] = {"commit": commit, **machine, "checks": {}}
    for check in CHECKS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = check(Path(folder))
            except Exception as error:  # one failure leaves the other checks
                result = {"passed": False, "error": f"{type(error).__name__}: {error}"}
        results["checks"][check.__name__] = result
        print("passed" if result["passed"] else "FAILED", check.__name__, flush=True)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(OUT, json.dumps(results, indent=2) + "\n")
    sys.exit(0 if all(result["passed"] for result in results["checks"].values()) else 1)


if __name__ == "__main__":
    main()
