"""The tables of a benchmark's record, as rows of text, the first of them titles. Nothing here needs torch."""

from collections.abc import Callable
from statistics import median
from typing import Any

Table = list[list[str]]
MIB = 2**20
CONTESTANT = ["network", "precision", "compiled", "recompute", "kernel"]


def training_table(record: dict[str, Any]) -> Table:
    """A training step of each contestant: time, beside the plain network's in the same precision; memory; roofs."""
    titles = [*CONTESTANT, "ms", "of plain", "quartiles", "processor, of plain"]
    first = next(row for row in record["training"] if row["kind"] == "plain")
    titles += [
        f"of plain, {first['precision']}",
        "GFLOP",
        "GiB moved",
        "of matmul rate",
        "of copy rate",
        "kept, MiB/image",
        "peak, MiB",
    ]
    rows = [titles]
    for row in record["training"]:
        of_first = median(own[0] / one[0] for own, one in zip(row["readings"], first["readings"], strict=True))
        cells = [*_ratio_cells(row), f"{of_first:.2f}", f"{row['flops'] / 1e9:.3g}", f"{row['bytes'] / 2**30:.3g}"]
        cells += [f"{row['utilisation']:.2f}", f"{row['traffic_utilisation']:.2f}"]
        cells.append(f"{row['saved_bytes'] / MIB:.3g}")
        cells.append(f"{row['peak_bytes'] / MIB:.0f}" if "peak_bytes" in row else "")
        rows.append([*_contestant(row), *cells])
    return rows


def sampling_table(record: dict[str, Any]) -> Table:
    """An evaluation of each contestant, by number of images, guided or not."""
    titles = ["images", "guided", *CONTESTANT, "ms", "of plain", "quartiles"]
    rows = [[*titles, "processor, of plain", "images/s"]]
    for row in record["sampling"]:
        first = [str(row["images"]), "yes" if row["guided"] else "no"]
        rows.append([*first, *_contestant(row), *_ratio_cells(row), f"{row['images_per_second']:.4g}"])
    return rows


def parts_table(record: dict[str, Any]) -> Table:
    """Where a training step's time goes: the field is the head without its weight generation, the rest a difference."""
    found = {row["part"]: row for row in record["parts"]["rows"]}
    rows = [["part", "ms", "of the step", "processor ms", "of the step"]]
    clocks = "seconds", "processor_seconds"
    times = {name: [row[clock] for clock in clocks] for name, row in found.items()}
    if "weight generation" in times:
        times["field"] = [head - made for head, made in zip(times["head"], times["weight generation"], strict=True)]
        del times["head"]
    whole = [step + drawn for step, drawn in zip(times.pop("step"), times["input"], strict=True)]
    del times["gradient"]
    times["rest"] = [
        total - sum(values) for total, values in zip(whole, zip(*times.values(), strict=True), strict=True)
    ]
    times["step and input"] = whole
    for name, values in times.items():
        cells = [cell for value, total in zip(values, whole, strict=True) for cell in _share(value, total)]
        rows.append([name, *cells])
    return rows


def operators_table(record: dict[str, Any], count: int = 12) -> Table:
    """The operators that take longest, by the profile of some steps."""
    rows = [["operator", "calls", "ms", "share"]]
    for row in record["operators"][:count]:
        rows.append([row["operator"], f"{row['calls']:.0f}", f"{1e3 * row['seconds']:.3g}", f"{row['share']:.1%}"])
    return rows


def scaling_table(record: dict[str, Any]) -> Table:
    """Fitted exponents: cost grows like the axis's value to this power."""
    rows = [["axis", "values", "time", "processor time", "FLOPs", "bytes", "kept"]]
    for axis, found in record["scaling"].items():
        values = " ".join(str(row["value"]) for row in found["rows"])
        rows.append([axis, values, *(f"{value:.2f}" for value in found["exponents"].values())])
    return rows


def roofs_table(record: dict[str, Any]) -> Table:
    """What the machine does at best."""
    rows = [["precision", "matmul, GFLOP/s", "copy, GB/s"]]
    for precision, roofs in record["roofs"].items():
        rows.append([precision, f"{roofs['matmul'] / 1e9:.4g}", f"{roofs['copy'] / 1e9:.4g}"])
    return rows


TABLES: dict[str, Callable[[dict[str, Any]], Table]] = {
    "the machine at best": roofs_table,
    "a training step": training_table,
    "an evaluation while sampling": sampling_table,
    "a training step by part": parts_table,
    "a training step by operator": operators_table,
    "exponents": scaling_table,
}


def _contestant(row: dict[str, Any]) -> list[str]:
    kernel = row["kernel"] + ", recorded" * row["recorded"]
    return [row["kind"], row["precision"], "yes" if row["compiled"] else "no", row["recompute"], kernel]


def _ratio_cells(row: dict[str, Any]) -> list[str]:
    wall, processor = row["of_plain"]["wall"], row["of_plain"]["processor"]
    spread = f"{wall['low']:.2f} … {wall['high']:.2f}"
    return [f"{1e3 * row['seconds']:.4g}", f"{wall['median']:.2f}", spread, f"{processor['median']:.2f}"]


def _share(value: float, whole: float) -> list[str]:
    return [f"{1e3 * value:.3g}", f"{value / whole:.1%}"]
