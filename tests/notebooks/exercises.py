"""notebooks/exercises/ from the lessons: the same notebooks without solutions and outputs.

python -m tests.notebooks.exercises
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .notebook_files import EXERCISES, LESSONS, cells, tags


def with_exercises() -> list[Path]:
    return [path for path in LESSONS if any("solution" in tags(cell) for cell in cells(path, "code"))]


def generate(lessons: Sequence[Path], folder: Path) -> list[Path]:
    """Write the lessons' exercises into `folder`; nbstripout leaves out their solutions and outputs.

    Paths in the lessons lead from notebooks/ to runs and to other notebooks; here they start one folder deeper.
    """
    paths = [Path(shutil.copy(lesson, folder)) for lesson in lessons]
    command = [sys.executable, "-m", "nbstripout", "--keep-id", "--drop-tagged-cells", "solution"]
    command += ["--extra-keys", "metadata.workbook cell.metadata.wrong", *map(str, paths)]
    subprocess.run(command, check=True)
    for path in paths:
        text = re.sub(r"\]\((?=00_|demo|scale/|measured)", "](../", path.read_text())
        path.write_text(text.replace('\\"../runs/', '\\"../../runs/'))
    return paths


if __name__ == "__main__":
    EXERCISES.mkdir(exist_ok=True)
    for old in EXERCISES.glob("*.ipynb"):
        old.unlink()
    for path in generate(with_exercises(), EXERCISES):
        print(path.relative_to(Path.cwd()))
