"""Do a lesson's checks notice mistakes? python -m tests.notebooks.prove NOTEBOOK

Runs the lesson's cells at smoke size, one after the other. A stub has to raise NotImplementedError in the check that
follows. A cell that has `wrong` in its metadata, a list of {cell, old, new}, has to fail for each of them: the named
cell is run again with `old` replaced by `new`, then the check, and then both as they stand in the lesson.
"""

import json
import os
import sys
import warnings
from pathlib import Path

from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from .notebook_files import read, solved

warnings.filterwarnings("ignore")


class Lesson:
    """The lesson's namespace, with IPython's `In` and `display` as a notebook has them."""

    def __init__(self) -> None:
        self.shell = InteractiveShell.instance()

    def error(self, source: str) -> BaseException | None:
        """What a cell raises."""
        with capture_output():
            result = self.shell.run_cell(source, store_history=True)
        return result.error_before_exec or result.error_in_exec


def prove(path: Path, parameters: dict) -> list[str]:
    """What is wrong with the lesson's checks, in sentences."""
    notebook, lesson, faults = solved(read(path)), Lesson(), []
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    stub = None
    for name, cell in cells.items():
        tags = cell.metadata.get("tags", [])
        if "solution" in tags:
            stub, solution = name_before(cells, name), name
            continue  # first its check without it
        if stub is not None:
            if not isinstance(lesson.error(cell.source), NotImplementedError):
                faults.append(f"{path.name}: {name} passes, or fails otherwise, while {stub} is not implemented")
            lesson.error(cells[solution].source)
            stub = None
        if error := lesson.error(cell.source):
            return [*faults, f"{path.name}: {name} fails: {type(error).__name__}: {error}"]
        if "parameters" in tags:
            lesson.error("\n".join(f"{key} = {value!r}" for key, value in parameters.items()))
        for wrong in cell.metadata.get("wrong", []):
            definition = cells[wrong["cell"]].source
            if definition.count(wrong["old"]) != 1:
                faults.append(f"{path.name}: {wrong['old']!r} stands not just once in {wrong['cell']}")
                continue
            lesson.error(definition.replace(wrong["old"], wrong["new"]))
            if lesson.error(cell.source) is None:
                faults.append(f"{path.name}: {name} does not notice {wrong['new']!r} in {wrong['cell']}")
            lesson.error(definition)
    if stub is not None:
        faults.append(f"{path.name}: {solution} has no check behind it")
    return faults


def name_before(cells: dict, name: str) -> str:
    names = list(cells)
    return names[names.index(name) - 1]


if __name__ == "__main__":
    source, given = Path(sys.argv[1]).resolve(), json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    os.environ.setdefault("MPLBACKEND", "agg")
    found = prove(source, given)
    print("\n".join(found) or f"{source.name}: every check notices its mistakes")
    sys.exit(1 if found else 0)
