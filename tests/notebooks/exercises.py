"""notebooks/exercises/ from the lessons: the same notebooks without solutions and outputs.

python -m tests.notebooks.exercises
"""

import re
import subprocess
import sys
from pathlib import Path

from .notebook_files import EXERCISES, LESSONS, cells, tags


def with_exercises() -> list[Path]:
    return [path for path in LESSONS if any("solution" in tags(cell) for cell in cells(path, "code"))]


def generate(lesson: Path, folder: Path) -> Path:
    """Write a lesson's exercises into `folder`; nbstripout leaves out its solutions and outputs.

    Paths in the lesson lead from notebooks/ to runs and to other notebooks; here they start one folder deeper.
    """
    command = [sys.executable, "-m", "nbstripout", "--keep-id", "--drop-tagged-cells", "solution"]
    command += ["--extra-keys", "metadata.workbook cell.metadata.wrong", "--textconv", str(lesson)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    text = re.sub(r"\]\((?=00_|demo|scale/)", "](../", text)
    text = text.replace('\\"../runs/', '\\"../../runs/')
    path = folder / lesson.name
    path.write_text(text)
    return path


if __name__ == "__main__":
    EXERCISES.mkdir(exist_ok=True)
    wanted = with_exercises()
    for stale in set(EXERCISES.glob("*.ipynb")) - {EXERCISES / path.name for path in wanted}:
        stale.unlink()
    for path in wanted:
        print(generate(path, EXERCISES).relative_to(Path.cwd()))
