"""The notebooks of this project: which there are, what their metadata declare, and running one with its cost measured.

A notebook's metadata have an entry `workbook`: `smoke`, the parameters of a short run; `budget`, the GiB that such a
run may take and the processor time that it should, in units of a fixed piece of work (see `unit`); and in a lesson
`executed`, the hash of the code whose outputs it keeps.

The solution of an exercise is a folded Markdown cell tagged `solution`: Jupyter never runs it, so it cannot overwrite
a reader's answer. What is tested and executed here is `solved`, in which solutions are code.
"""

import ast
import copy
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
EXERCISES = FOLDER / "exercises"
LESSONS = sorted(FOLDER.glob("*.ipynb"))  # read by people, kept with their outputs
SCALE = sorted((FOLDER / "scale").glob("*.ipynb"))  # for papermill, by parameters up to full size; kept without
NOTEBOOKS = [*LESSONS, *SCALE]
ALLOWED = "raises-exception"  # Jupyter goes on behind such a cell: the check of an exercise that is not solved yet


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == kind]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def declared(path: Path) -> set[str]:
    """The names that the cells tagged `parameters` assign."""
    tagged = [cell for cell in cells(path, "code") if "parameters" in tags(cell)]
    return {target.id for cell in tagged for statement in ast.parse(cell.source).body for target in statement.targets}


def smoke(path: Path, run: Path, out: Path) -> dict[str, Any]:
    """Parameters of a short run that reads the run at `run` and writes to `out`, where the notebook does either."""
    places = {"run": str(run), "out": str(out), "results": str(Path(__file__).with_name("geneval_results.jsonl"))}
    places["study"] = str(FOLDER / "studies" / "rehearsal.yaml")
    places["record"] = str(FOLDER.parent / "data" / "ablations" / "noise")
    given = dict(read(path).metadata.workbook.smoke)
    return given | {name: place for name, place in places.items() if name in declared(path)}


def solution_code(cell: nbformat.NotebookNode) -> str:
    """The Python in a folded solution. Raises ValueError if it is not written as `fold` writes one."""
    match = re.fullmatch(re.escape(fold("\0")).replace("\0", "(.+)"), cell.source, re.DOTALL)
    if not match:
        raise ValueError(f"{cell.id} is tagged as a solution but is not one folded block of Python")
    return match[1]


def fold(code: str) -> str:
    """A solution as Markdown that unfolds in Jupyter, in the book and on a code host."""
    return f"<details>\n<summary>Solution</summary>\n\n```python\n{code}\n```\n\n</details>"


def solved(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with its solutions as code cells behind their stubs, and with no cell that is allowed to fail."""
    notebook = copy.deepcopy(notebook)
    for place, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown" and "solution" in tags(cell):
            notebook.cells[place] = nbformat.v4.new_code_cell(solution_code(cell), id=cell.id, metadata=cell.metadata)
        elif ALLOWED in tags(cell):
            cell.metadata.tags = [tag for tag in tags(cell) if tag != ALLOWED]
    return notebook


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """Of all code with the solutions; a lesson with another hash than `executed` shows outputs of older code."""
    sources = [cell.source for cell in solved(notebook).cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()[:16]


def is_current(notebook: nbformat.NotebookNode) -> bool:
    """Whether its outputs are those of its code."""
    return notebook.metadata.get("workbook", {}).get("executed") == code_hash(notebook)


@dataclass(frozen=True)
class Finished:
    """A process that ended."""

    code: int
    output: str
    seconds: float
    processor_seconds: float
    """of all its processes: what it takes however busy the machine is"""
    gib: float
    """peak resident memory of the process or of the largest that it started and waited for, a notebook's kernel"""


# A process starts with the peak memory of the one that starts it, so a small one has to do that.
STARTER = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as file:
    json.dump([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss], file)
"""


def measured(command: list[str], folder: Path, **environment: str) -> Finished:
    """Run a command and measure it."""
    with tempfile.TemporaryDirectory() as place:
        report, output = Path(place) / "usage.json", Path(place) / "output.txt"
        begin = time.perf_counter()
        with output.open("w") as file:
            starter = [sys.executable, "-S", "-c", STARTER, str(report), *command]
            subprocess.run(starter, cwd=folder, env={**os.environ, **environment}, stdout=file, stderr=file, check=True)
        seconds = time.perf_counter() - begin
        code, computing, kib = json.loads(report.read_text())
        return Finished(code, output.read_text(), seconds, computing, kib / 2**20)  # KiB on Linux


WORK = "import torch\nx = torch.rand(512, 512)\nfor _ in range(300): x = (x @ x).softmax(1)"


@functools.cache
def unit() -> float:
    """Seconds of processor time that a fixed piece of work takes now and here: torch's import and some products."""
    return measured([sys.executable, "-c", WORK], ROOT).processor_seconds
