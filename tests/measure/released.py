"""What it costs to load the largest file in the layout of the released weights.

python -m tests.measure.released writes an XL/16 checkpoint (2.8 GB, float32) to a temporary folder and loads it in a
fresh process: peak resident memory relative to the weights' size, and seconds.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from pixnerd import SIZES, PixNerd, load_released

from ..released_layout import as_released


def peak_gib() -> float:
    """This process's peak memory, mapped files included (Linux; getrusage would count the parent's)."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def load_and_report(path: str) -> None:
    before, begin = peak_gib(), time.perf_counter()
    model = load_released(path)
    seconds = time.perf_counter() - begin
    loaded = peak_gib() - before
    total = sum(float(parameter.detach().sum()) for parameter in model.parameters())  # reads every page
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**30
    print(f"weights {weights:.2f} GiB (checksum {total:.3f}), loaded in {seconds:.1f} s")
    print(f"peak memory over the empty process: {loaded / weights:.2f}x when loaded, ", end="")
    print(f"{(peak_gib() - before) / weights:.2f}x once every weight was read")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        load_and_report(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "xl.ckpt"
            torch.save({"state_dict": as_released(PixNerd(SIZES["XL/16"], 1000))}, path)
            subprocess.run([sys.executable, "-m", "tests.measure.released", str(path)], check=True)
