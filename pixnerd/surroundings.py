"""With what something is made or measured: versions, commit, machine, threads, device."""

import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .data.prepared import machine
from .distributed import default_device


def surroundings() -> dict[str, Any]:
    """Versions of pixnerd and torch, commit, machine, threads and device, ready for JSON."""
    device = default_device()
    return {
        "pixnerd": version("pixnerd"),
        "commit": commit(),
        "torch": torch.__version__,
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def commit() -> str | None:
    """The package's git commit, with -dirty if a tracked file differs; None outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
