"""Execute the lessons at their real size and keep their outputs: python -m tests.notebooks.refresh [NAME …]

Exercises are executed with their solutions; in the lesson these stay folded.

What differs from one run to the next without meaning anything (progress bars, timings) is dropped, and so are widgets,
which need a kernel behind them: a reader on a code host sees the figures, and a diff shows what changed. Prints what
each run took.
"""

import base64
import io
import sys
import tempfile
from pathlib import Path

import nbformat
import papermill
from PIL import Image

from .notebook_files import FOLDER, LESSONS, code_hash, measured, read, solved

LARGE = 60_000  # characters of a figure in the notebook


def is_passing(output: nbformat.NotebookNode) -> bool:
    """Progress bars and widgets."""
    return output.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def in_few_colours(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The output with its figure in at most 256 colours, which look the same in a plot and need a third of the space,
    if it is a large one."""
    figure = output.get("data", {}).get("image/png", "")
    if len(figure) > LARGE:
        file = io.BytesIO()
        Image.open(io.BytesIO(base64.b64decode(figure))).convert("RGB").quantize(256).save(file, "PNG", optimize=True)
        output.data["image/png"] = base64.b64encode(file.getvalue()).decode()
    return output


def keep_outputs(path: Path, executed: Path) -> None:
    """Put the outputs of `executed`, the solved notebook of `path` as papermill ran it, into `path`."""
    source, run = read(path), read(executed)
    for cell, asked, ran in zip(source.cells, solved(source).cells, run.cells, strict=True):
        if asked.cell_type == "code" and asked.source != ran.source:
            raise SystemExit(f"{executed} ran another version of {path}: cell {cell.id} differs")
        if cell.cell_type == "code":
            cell.execution_count = ran.execution_count
            cell.outputs = [in_few_colours(output) for output in ran.outputs if not is_passing(output)]
    source.metadata.setdefault("workbook", {})["executed"] = code_hash(source)
    nbformat.write(source, path)


def execute(path: str, executed: str) -> None:
    papermill.execute_notebook(
        path, executed, cwd=FOLDER, kernel_name="python3", coalesce_streams=True, progress_bar=False
    )


def refresh(path: Path) -> str:
    """A line of a table: what the run took."""
    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder) / path.name
        nbformat.write(solved(read(path)), executed)
        call = f"from tests.notebooks.refresh import execute; execute({str(executed)!r}, {str(executed)!r})"
        done = measured([sys.executable, "-c", call], FOLDER.parent)
        if done.code:
            raise SystemExit(f"{path.name} failed:\n{done.output[-4000:]}")
        keep_outputs(path, executed)
    minutes = f"{done.seconds / 60:.1f} | {done.processor_seconds / 60:.1f}"
    return f"| {path.stem} | {minutes} | {done.gib:.1f} |"


if __name__ == "__main__":
    names = sys.argv[1:] or [path.stem for path in LESSONS]
    print("| notebook | minutes | of processor | peak memory, GiB |\n|---|---|---|---|", flush=True)
    for name in names:
        print(refresh(FOLDER / f"{name}.ipynb"), flush=True)
