"""How much slower does a training step get beside a busy process, and beside a second training?

    python -m tests.measure.busy_neighbour [STEPS]          40 by default

The step is that of the digits, eager, with a thread for each core, in a process of its own: alone, beside a process
that computes all the time, and beside a second one like it. First as the package sets OpenMP up, then with OpenMP's own
default, threads that spin for long. Prints medians in milliseconds and the ratios to "alone" as the package sets it up.
With LD_PRELOAD=…/libiomp5.so (pip download intel-openmp) in the environment, torch's wheels use Intel's OpenMP.
"""

import os
import re
import statistics
import subprocess
import sys

STEP = """
import sys, time
import pixnerd  # before torch: see pixnerd/__init__.py
import torch
from pixnerd import PixNerd, flow
from pixnerd.recipes import RECIPES
model = PixNerd(RECIPES["digits-cpu"].model, 10)
x, labels = torch.randn(64, 1, 32, 32), torch.arange(64) % 10
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
times = []
for _ in range(int(sys.argv[1])):
    begin = time.perf_counter()
    flow.loss(model, x, labels, torch.randn_like(x), torch.rand(64)).mean.backward()
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.perf_counter() - begin)
print(*times)
"""
BUSY = "while True: pass"
LONG_SPIN = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}  # what libgomp and libiomp take unless told otherwise


def started(code: str, *arguments: str, own: dict[str, str]) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not re.match("G?OMP_|KMP_", name)} | own
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )


def milliseconds(own: dict[str, str], steps: int, beside: str) -> float:
    """The median step; `beside` is "alone", "busy" or "twice"."""
    runs = [started(STEP, str(steps), own=own) for _ in range(2 if beside == "twice" else 1)]
    busy = [started(BUSY, own=own)] if beside == "busy" else []
    outputs = [run.communicate()[0] for run in runs]
    for process in busy:
        process.kill()
        process.wait()
    times = [float(word) for output in outputs for word in output.split()[3:]]  # without the first steps
    return 1000 * statistics.median(times)


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    alone = None
    for name, own in (("as the package sets it", {}), ("OpenMP's default", LONG_SPIN)):
        for beside in ("alone", "busy", "twice"):
            found = milliseconds(own, steps, beside)
            alone = alone or found
            print(f"{name:24} {beside:6} {found:8.1f} ms   {found / alone:5.2f}", flush=True)


if __name__ == "__main__":
    main()
