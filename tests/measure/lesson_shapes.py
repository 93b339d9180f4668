"""How long the lessons are, and how long they should be: python -m tests.measure.lesson_shapes

Exercises count as cells and words; a stub and its solution do not count as code, but the check after them does.
"""

import statistics

from ..notebooks.notebook_files import LESSONS, cells, read, tags

TARGETS = "| target | 35–55 | 1,200–2,200 | ≤ 150 | < 10 | ≤ 40 | 3–6 | ≤ 700 |"


def row(path) -> str:
    code = [cell for cell in cells(path, "code") if not {"stub", "solution"} & set(tags(cell))]
    lines = [sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in code]
    words = sum(len(cell.source.split()) for cell in cells(path, "markdown"))
    figures = sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    numbers = [len(read(path).cells), words, sum(lines), statistics.median(lines), max(lines), figures]
    return f"| {path.stem} | " + " | ".join(f"{n:,g}" for n in numbers) + f" | {path.stat().st_size // 1000} |"


if __name__ == "__main__":
    print("| lesson | cells | words | lines of code | median cell | longest cell | figures | kB |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join([row(path) for path in LESSONS if path.stem[:2].isdigit()]))
    print(TARGETS)
