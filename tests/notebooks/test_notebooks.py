"""Every notebook runs at smoke size under nbval, and keeps the rules that papermill does not enforce."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
SMOKE = {"00_quickstart": {"steps": 3, "samples_per_class": 1}}
names = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


@names
def test_runs_at_smoke_size_and_its_checks_hold(path, tmp_path):
    """Prepared by papermill with small parameters, run by nbval; cells marked NBVAL_CHECK_OUTPUT are compared."""
    prepared = tmp_path / path.name
    parameters = {**SMOKE[path.stem], "out": str(tmp_path / "run")}
    papermill.execute_notebook(path, prepared, parameters, prepare_only=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env"]
    command += ["--nbval-cell-timeout=240", "--rootdir", str(tmp_path), str(prepared)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(rf"{len(cells(path, 'code')) + 1} passed", done.stdout), done.stdout  # papermill adds one cell


@names
def test_has_one_cell_of_plain_parameters_and_reads_each(path):
    tagged = [cell for cell in cells(path, "code") if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    statements = ast.parse(tagged[0].source).body
    assert all(isinstance(s, ast.Assign) and len(s.targets) == 1 for s in statements)
    for statement in statements:
        ast.literal_eval(statement.value)  # a literal, so that an injected value replaces it without side effects
    parameters = {statement.targets[0].id for statement in statements}
    later = "\n".join(cell.source for cell in cells(path, "code") if cell is not tagged[0])
    read = {node.id for node in ast.walk(ast.parse(later)) if isinstance(node, ast.Name)}
    assert parameters <= read
    assert SMOKE[path.stem].keys() | {"out"} <= parameters


@names
def test_is_portable_and_kept_as_it_ran(path):
    notebook = nbformat.read(path, as_version=4)
    assert (notebook.metadata.kernelspec.name, notebook.metadata.kernelspec.language) == ("python3", "python")
    for cell in cells(path, "code"):
        assert cell.execution_count is not None
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"  # no progress bars
            assert len(str(output.get("data", {}).get("image/png", ""))) < 60_000 * 4 / 3
    assert path.stat().st_size < 700_000


def test_a_notebook_that_fails_is_noticed(tmp_path):
    """The check of the checks: a changed kept output and an exception both turn the run red."""
    for source, output in [("# NBVAL_CHECK_OUTPUT\nprint(1 + 1)", "3\n"), ("1 / 0", "")]:
        cell = nbformat.v4.new_code_cell(source, execution_count=1)
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=output)] if output else []
        notebook = nbformat.v4.new_notebook(cells=[cell])
        notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
        nbformat.write(notebook, tmp_path / "broken.ipynb")
        command = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--nbval-current-env", "broken.ipynb"]
        assert subprocess.run(command, capture_output=True, cwd=tmp_path).returncode == 1
