"""On a GPU, for real: what the tests show with fake tensors and several processes of a CPU.

python -m tests.measure.gpu_checks [CHECK …]

Writes what the checks find into data/benchmarks/gpu_checks.json, beside what others found there; ends with 1 if one
failed, and with 2 where there is no GPU or no such check.
"""

import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

from pixnerd import SIZES, PixNerd, fields, flow, fused, sample
from pixnerd.compiling import compile_regions
from pixnerd.conditions import training_conditions
from pixnerd.config import TrainConfig
from pixnerd.cost import clock, saved_activation_bytes
from pixnerd.data import load
from pixnerd.distributed import World
from pixnerd.encodings import coordinate_table
from pixnerd.fields import NeuralFieldHead
from pixnerd.files import write_atomically
from pixnerd.layers import RMSNorm, rotary_table
from pixnerd.planning import CARDS, POLICIES, plan_run
from pixnerd.recorded import record_small_batches
from pixnerd.runs import Run
from pixnerd.surroundings import surroundings
from pixnerd.text import TEXT_SIZES, build_network
from pixnerd.training import draw_step, loop, train
from pixnerd.training.batches import step_batches
from pixnerd.training.losses import VelocityLoss

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
    """Stopped after three steps and resumed, with `deterministic`: losses and the last checkpoint, bit for bit."""
    losses, files = {}, {}
    for name, stops in (("straight", (None,)), ("resumed", (3, None))):
        config, losses[name] = dataclasses.replace(CONFIG, out=str(folder / name), deterministic=True), []
        for stop in stops:
            for kernel in (fused.forward_kernel, fused.backward_kernel):
                kernel.cache.clear()  # another process would choose a configuration anew
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
    """Two graphs and no break, for every policy and both kernels of the field, with the inductor."""
    found = {}
    for recompute, kernel in itertools.product(("none", "head", "all"), ("torch", "fused")):
        torch._dynamo.reset()
        counters.clear()
        with mock.patch.object(loop, "check_compiler"):  # its trial is a graph of its own
            out = str(folder / f"{recompute}-{kernel}")
            for _ in train(dataclasses.replace(CONFIG, out=out, recompute=recompute, field_kernel=kernel), GPU):
                pass
        found[f"{recompute}, {kernel}"] = [counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())]
    return {"passed": all(counts == [2, 0] for counts in found.values()), "graphs and breaks": found}


def memory(folder: Path) -> dict[str, Any]:
    """Bytes that a third image of 256 pixels keeps, against the count, for two blocks of L/16; MiB."""
    found, config = {}, dataclasses.replace(SIZES["L/16"], blocks=2)
    for recompute, kernel in itertools.product(("none", "head", "all"), ("torch", "fused")):
        model = PixNerd(config, 10, recompute, kernel).to(GPU).train()
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
        found[f"{recompute}, {kernel}"] = [(kept[2] - kept[1]) / 2**20, saved_activation_bytes(model, 256) / 2**20]
    passed = all(abs(measured - counted) < 0.05 * counted + 4 for measured, counted in found.values())
    return {"passed": passed, "measured and counted": found}


def head_on_gpu(
    kernel: str, recompute: bool, compiled: bool, exact: bool = False
) -> tuple[NeuralFieldHead, Callable[[], Tensor]]:
    """The head of XL/16, and what computes it for 32 images of 256 pixels, with its gradients; in bfloat16 or exact."""
    torch.manual_seed(0)
    head = NeuralFieldHead(1152, 3, blocks=4, kernel=kernel).to(GPU)
    nn.init.normal_(head.out.weight, std=0.1)  # zero at the start, which would hide every gradient
    pixels, s = torch.randn(32 * 256, 256, 3, device=GPU), torch.randn(32 * 256, 1152, device=GPU)
    s.requires_grad_()
    if compiled:
        head.decode = torch.compile(head.decode, dynamic=False)

    def step() -> Tensor:
        head.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=not exact):
            out = head(pixels, s, (16, 16), recompute)
        out.float().square().mean().backward()
        return out.detach()

    return head, step


def fused_field(folder: Path) -> dict[str, Any]:
    """The fused kernel against torch for XL/16's head: as exact as torch, in less time and memory; ms and GiB.

    The time is that of forward and backward pass, the median of 20; exactness is that of the output and of the first
    generator's gradient, relative to float32.
    """
    head, step = head_on_gpu("torch", True, False, exact=True)
    exact = step(), head.blocks[0].generator.weight.grad.clone()
    errors, times, peaks = {}, {}, {}
    for kernel, recompute, compiled in itertools.product(("torch", "fused"), (False, True), (False, True)):
        name = f"{kernel}, {'recomputed' if recompute else 'kept'}, {'compiled' if compiled else 'eager'}"
        torch._dynamo.reset()
        head, step = head_on_gpu(kernel, recompute, compiled)
        found = step(), head.blocks[0].generator.weight.grad.clone()
        errors[name] = [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
        torch.cuda.reset_peak_memory_stats()
        spent = []
        for _ in range(23):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            torch.cuda.synchronize()
            spent.append(begin.elapsed_time(end))
        times[name], peaks[name] = statistics.median(spent[3:]), torch.cuda.max_memory_allocated() / 2**30
    pays = min(times["fused, kept, compiled"], times["fused, kept, eager"]) < times["torch, recomputed, compiled"]
    most = 1.1 * max(map(max, (e for name, e in errors.items() if name.startswith("torch"))))
    return {
        "passed": pays and all(max(error) <= most for error in errors.values()),
        "pays": pays,
        "errors": errors,
        "milliseconds": times,
        "peak": peaks,
    }


def pieces(folder: Path) -> dict[str, Any]:
    """What recomputing XL/16's head costs by the patches of a piece: ms by the clock, ms of the processor, peak GiB.

    If the two times are alike, the GPU waits for the processor, which has every piece's kernels to start.
    """
    found = {}
    for compiled, patches in itertools.product((False, True), (1024, 2048, 4096, 8192)):
        torch._dynamo.reset()
        with mock.patch.object(fields, "PATCHES_PER_PIECE", patches):
            _, step = head_on_gpu("torch", True, compiled)
            step()
            torch.cuda.reset_peak_memory_stats()
            spent = []
            for _ in range(13):
                begin = clock()
                step()
                started = time.perf_counter()
                spent.append((clock() - begin, started - begin))
        times = [1e3 * statistics.median(values) for values in zip(*spent[3:], strict=True)]
        name = f"{patches} patches, {'compiled' if compiled else 'eager'}"
        found[name] = [*times, torch.cuda.max_memory_allocated() / 2**30]
    return {"passed": True, "milliseconds, of the processor, peak": found}


def recorded_sampling(folder: Path) -> dict[str, Any]:
    """Samples from recordings are those of the network bit for bit; milliseconds a pass of one image of XL/16."""
    different, times = [], {}
    labels = PixNerd(SIZES["small/8"], 10), torch.arange(3)
    text = build_network(TEXT_SIZES["text-nano/8"], None), torch.randn(3, 16, 384)
    student = PixNerd(dataclasses.replace(SIZES["small/8"], student=True), 10), torch.arange(3)
    nothing = torch.zeros(16, 384)
    for name, (model, condition), options in (
        ("labels", labels, {"guidance": 2.0}),
        ("text", text, {"guidance": 2.0, "unconditional": nothing}),
        ("student", student, {"solver": "map", "guidance": 1.0}),
    ):
        randomise(model.to(GPU).eval())
        for base, size in ((None, (32, 32)), ((32, 32), (64, 64))):
            options |= {"steps": 8, "size": size, "base_resolution": base}
            with torch.autocast("cuda", torch.bfloat16):
                expected = sample(model, condition, **options)
            record_small_batches(model)
            for table in (rotary_table, coordinate_table):
                table.cache_clear()
            with torch.autocast("cuda", torch.bfloat16):
                found = [sample(model, condition, **options) for _ in range(2)]
            if not model.forward.recordings or not all(one.equal(expected) for one in found):
                different.append(f"{name}, {size}")
            del model.forward  # the class's own again
    model = PixNerd(SIZES["XL/16"], 10).to(GPU).eval()
    for way in ("eager", "recorded", "compiled", "compiled and recorded"):
        if way == "compiled":
            del model.forward
            compile_regions(model, any_batch=True)
        if "recorded" in way:
            record_small_batches(model)
        for images in (1, 2, 4, 8, 14):  # more are not recorded
            x, t = torch.randn(images, 3, 256, 256, device=GPU), torch.rand(images, device=GPU)
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                for _ in range(5):
                    model(x, t, model.example_condition(images))
                spent = [-clock() + (model(x, t, model.example_condition(images)), clock())[1] for _ in range(20)]
            times[f"{way}, {images}"] = 1e3 * statistics.median(spent)
    return {"passed": not different, "different": different, "milliseconds": times}


def randomise(model: nn.Module) -> None:
    """Give random values to weights that are zero at the start, which would hide what they multiply."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def step_on_card(config: TrainConfig, folder: Path) -> None:
    """Two whole training steps of random images in the training loop's own way, without compiling."""
    world, dataset = World(0, 1, GPU), load("synthetic", config.model.image_size)
    conditions = training_conditions(config, dataset, GPU)
    job = loop.Job(config, Run(folder), {}, conditions, VelocityLoss(config), [], world)
    state = loop.build_state(job, None)
    batches = step_batches(config, {config.model.image_size: dataset}, conditions, 0, world)
    for _ in range(2):
        loop.compute_gradients(job, state, next(batches))
        loop.update_weights(job, state)


def cards(folder: Path) -> dict[str, Any]:
    """The most images of L/16 that the plan says fit a card fit in its memory; GiB predicted, and taken at most."""
    rows, whole = [], torch.cuda.get_device_properties(0).total_memory
    run = TrainConfig(data="synthetic", model=SIZES["L/16"], compile="off", workers=0)
    for (sold, card), policy, kernel in itertools.product(CARDS.items(), POLICIES, ("torch", "fused")):
        config = dataclasses.replace(run, recompute=policy, field_kernel=kernel)
        plan = plan_run(config, num_classes=10)
        images = min(plan.most_images(policy, card), 512)  # more take long
        if images and card * 2**30 < whole:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_per_process_memory_fraction(card * 2**30 / whole)
            try:
                step_on_card(dataclasses.replace(config, batch_size=images), folder)
                taken = torch.cuda.max_memory_reserved() / 2**30
            except torch.OutOfMemoryError:
                taken = None
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
            predicted, most = plan.fit(images=images).total, torch.cuda.max_memory_allocated() / 2**30
            rows.append([sold, policy, kernel, images, predicted, most, taken])
    titles = "card, policy, kernel, images, predicted, most, reserved"
    return {"passed": bool(rows) and all(row[-1] is not None for row in rows), titles: rows}


CHECKS = (
    norms,
    drawing_without_waiting,
    step_without_waiting,
    resuming,
    compiled_graphs,
    memory,
    fused_field,
    pieces,
    recorded_sampling,
    cards,
)


def main() -> None:
    if not torch.cuda.is_available():
        print("These checks need a GPU, and torch finds none here.", file=sys.stderr)
        sys.exit(2)
    known = {check.__name__: check for check in CHECKS}
    asked = sys.argv[1:] or list(known)
    if unknown := [name for name in asked if name not in known]:
        print(f"There is no check {unknown[0]}; there are {', '.join(known)}.", file=sys.stderr)
        sys.exit(2)
    results = json.loads(OUT.read_text()) if OUT.is_file() else {}
    machine = {**surroundings(), "cuda": torch.version.cuda}
    for name in asked:
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = known[name](Path(folder))
            except Exception as error:  # one failure leaves the other checks
                result = {"passed": False, "error": f"{type(error).__name__}: {error}"}
        results[name] = {**result, "made_with": machine}
        print("passed" if result["passed"] else "FAILED", name, flush=True)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(OUT, json.dumps(results, indent=2) + "\n")
    sys.exit(0 if all(results[name]["passed"] for name in asked) else 1)


if __name__ == "__main__":
    main()
