"""notebooks/exercises/ from the lessons: the same notebooks without solutions, answers and outputs.

python -m tests.notebooks.exercises
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat

from .notebook_files import EXERCISES, LESSONS, read, tags


def with_exercises() -> list[Path]:
    return [path for path in LESSONS if any("solution" in tags(cell) for cell in read(path).cells)]


def generate(lessons: Sequence[Path], folder: Path) -> list[Path]:
    """Write the lessons' exercises into `folder`.

    Paths in the lessons lead from notebooks/ to runs, records and other notebooks; here they start one folder deeper.
    """
    paths = []
    for lesson in lessons:
        notebook = read(lesson)
        notebook.cells = [cell for cell in notebook.cells if not {"solution", "answers"} & set(tags(cell))]
        paths.append(folder / lesson.name)
        nbformat.write(notebook, paths[-1])
    command = [sys.executable, "-m", "nbstripout", "--keep-id"]
    command += ["--extra-keys", "metadata.workbook cell.metadata.wrong", *map(str, paths)]
    subprocess.run(command, check=True)
    for path in paths:
        text = re.sub(
            r"\]\((?=00_|command_line|demo|images/|notation|python|scale/|studies|measured)", "](../", path.read_text()
        )
        text = text.replace(
            f"without solutions and outputs: [exercises](exercises/{path.name})",
            f"with solutions and outputs: [lesson](../{path.name})",
        )
        path.write_text(re.sub(r'\\"\.\./(runs|data)/', r'\\"../../\1/', text))
    return paths


if __name__ == "__main__":
    EXERCISES.mkdir(exist_ok=True)
    for old in EXERCISES.glob("*.ipynb"):
        old.unlink()
    for path in generate(with_exercises(), EXERCISES):
        print(path.relative_to(Path.cwd()))
