"""Execute the lessons at their real size and keep their outputs: python -m tests.notebooks.refresh [NAME …]

What differs from one run to the next without meaning anything (progress bars, timings, parameters' cell of papermill)
is dropped, so that a reader on a code host sees the figures and a diff shows what changed.
"""

import sys
from pathlib import Path

import nbformat
import papermill

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def is_passing(output: nbformat.NotebookNode) -> bool:
    """Progress bars, and widgets, which need a kernel behind them."""
    return output.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def keep_outputs(path: Path, executed: Path) -> None:
    """Put the outputs of `executed`, a copy of the notebook at `path` that papermill ran, into `path`."""
    source, run = nbformat.read(path, as_version=4), nbformat.read(executed, as_version=4)
    for cell, ran in zip(source.cells, run.cells, strict=True):
        if cell.cell_type == "code":
            if cell.source != ran.source:
                raise SystemExit(f"{executed} ran another version of {path}: cell {cell.id} differs")
            cell.execution_count = ran.execution_count
            cell.outputs = [output for output in ran.outputs if not is_passing(output)]
    nbformat.write(source, path)


def refresh(path: Path) -> None:
    executed = path.with_suffix(".executed.ipynb")
    papermill.execute_notebook(path, executed, cwd=path.parent, kernel_name="python3", coalesce_streams=True)
    keep_outputs(path, executed)
    executed.unlink()


if __name__ == "__main__":
    for name in sys.argv[1:] or [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))]:
        refresh(NOTEBOOKS / f"{name}.ipynb")
