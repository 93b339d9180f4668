"""Do the project's own links lead somewhere? python -m tests.notebooks.links

Checks every relative link and picture in the pages, the lessons, their exercises and the README: the file is there, and
so is the heading, where one is named. Links to the web are not followed.
"""

import re
import sys
from pathlib import Path

from .notebook_files import EXERCISES, NOTEBOOKS, ROOT, cells

LINK = re.compile(r"!?\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def text_of(path: Path) -> str:
    """The Markdown of a page or a notebook, without its blocks of code."""
    if path.suffix == ".ipynb":
        text = "\n\n".join(cell.source for cell in cells(path, "markdown"))
    else:
        text = path.read_text()
    return re.sub(r"```.*?```|`[^`\n]+`(?!\])", "", text, flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """What a link into a page may name behind #: its headings as a code host and the book write them."""
    headings = re.findall(r"^#+ (.+)$", text_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def faults(path: Path) -> list[str]:
    """Sentences about a page's links that lead nowhere, and its pictures without a description."""
    found = []
    for match in LINK.finditer(text_of(path)):
        target, _, anchor = match["target"].partition("#")
        page = path.parent / target if target else path
        if "://" in match["target"] or target.startswith("mailto:"):
            continue
        if not page.exists():
            found.append(f"{path.relative_to(ROOT)}: there is no {target}")
        elif anchor and page.suffix in (".md", ".ipynb") and anchor not in anchors(page):
            found.append(f"{path.relative_to(ROOT)}: {page.name} has no heading #{anchor}")
        if match[0].startswith("!") and not match["text"].strip():
            found.append(f"{path.relative_to(ROOT)}: {target} has no description")
    return found


def pages() -> list[Path]:
    """All files whose links are checked."""
    written = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "notebooks").rglob("*.md"))]
    return [*written, *NOTEBOOKS, *sorted(EXERCISES.glob("*.ipynb"))]


if __name__ == "__main__":
    wrong = [fault for path in pages() for fault in faults(path)]
    print("\n".join(wrong) or f"the links of {len(pages())} pages lead somewhere")
    sys.exit(1 if wrong else 0)
