"""What a trained run's log says of it: figures for the tables of a study, and curves. It needs no torch."""

import math
import statistics
from typing import Any

from ..runs import Run

SPIKE = 3  # a gradient norm this many times the median is a spike
POINTS = 100  # logged steps of a curve that are kept at most
DIGITS = 6  # significant ones of every figure that is kept


def training_figures(run: Run) -> dict[str, float]:
    """From log.jsonl: loss and gradient norm over the last tenth of the log, spikes of the norm, seconds a step."""
    log = [entry for entry in run.read_log() if entry["loss"] is not None]  # None: every step was skipped
    if not log:
        return {}
    last = log[-max(1, len(log) // 10) :]
    norms = [entry["gradient_norm"] for entry in log]
    usual = statistics.median(norms)
    return {
        "loss": statistics.fmean(entry["loss"] for entry in last),
        "gradient_norm": statistics.fmean(norms[-len(last) :]),
        "gradient_spikes": sum(entry.get("largest_gradient_norm", 0) > SPIKE * usual for entry in log),
        "seconds_per_step": run.config().batch_size / statistics.median(entry["images_per_second"] for entry in log),
    }


def curves_of(run: Run) -> dict[str, list[float | None]]:
    """The curves of a run by name: what it logged, thinned, and the lists that a study measured for it."""
    log = run.read_log()
    log = log[:: -(-len(log) // POINTS) or 1]
    curves = {name: [rounded(entry.get(name)) for entry in log] for name in ("step", "loss", "gradient_norm") if log}
    lists = {name: value for name, value in run.metrics().get("study", {}).items() if isinstance(value, list)}
    return curves | {name: [rounded(entry) for entry in value] for name, value in sorted(lists.items())}


def rounded(value: Any) -> Any:
    """A float with six significant digits, None if it is not finite; anything else as it is."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
