"""How long the lessons are, and how long they should be: python -m tests.measure.lesson_shapes

Exercises count as cells and words; a stub does not count as code, but the check after it does. What is folded (hints,
solutions, answers) and what describes a picture does not count as words.
"""

import re
import statistics

from ..notebooks.notebook_files import LESSONS, cells, read, tags

TARGETS = "| target | 35–55 | 1,200–2,200 | ≤ 150 | < 10 | ≤ 40 | 3–6 | ≤ 700 |"


def row(path) -> str:
    code = [cell for cell in cells(path, "code") if "stub" not in tags(cell)]
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    text = re.sub(r"<details>.*?</details>|!\[.*?\]\(.*?\)", "", text, flags=re.DOTALL)
    lines = [sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in code]
    words = len(text.split())
    figures = sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    numbers = [len(read(path).cells), words, sum(lines), statistics.median(lines), max(lines), figures]
    return f"| {path.stem} | " + " | ".join(f"{n:,g}" for n in numbers) + f" | {path.stat().st_size // 1000} |"


if __name__ == "__main__":
    print("| lesson | cells | words | lines of code | median cell | longest cell | figures | kB |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join([row(path) for path in LESSONS if path.stem[:2].isdigit()]))
    print(TARGETS)
