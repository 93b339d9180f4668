"""Execute the lessons at their real size and keep their outputs: python -m tests.notebooks.refresh [NAME …]

What differs from one run to the next without meaning anything (progress bars, timings, parameters' cell of papermill)
is dropped, so that a reader on a code host sees the figures and a diff shows what changed.
"""

import sys
from pathlib import Path

import nbformat
import papermill

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def refresh(path: Path) -> None:
    executed = path.with_suffix(".executed.ipynb")
    papermill.execute_notebook(path, executed, cwd=path.parent, kernel_name="python3", coalesce_streams=True)
    source, run = nbformat.read(path, as_version=4), nbformat.read(executed, as_version=4)
    for cell, ran in zip(source.cells, run.cells, strict=True):
        if cell.cell_type == "code":
            cell.execution_count = ran.execution_count
            cell.outputs = [output for output in ran.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.pop("transient", None)
    nbformat.write(source, path)
    executed.unlink()


if __name__ == "__main__":
    wanted = sys.argv[1:] or [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
    for name in wanted:
        refresh(NOTEBOOKS / f"{name}.ipynb")
