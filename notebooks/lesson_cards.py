"""The cards of the lessons on the book's first page, from README's table and their own figures."""

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
from docutils import nodes
from PIL import Image
from sphinx.util.docutils import SphinxDirective

FOLDER = Path(__file__).parent
README = FOLDER.parent / "README.md"
ROW = re.compile(
    r"^\| \[\d\d\]\(notebooks/(\w+)\.ipynb\) \| (.+?) \| (.+?) \| .+? \|$", re.MULTILINE
)
NOTE = re.compile(r"^\\\* .+$", re.MULTILINE)  # what the star behind some minutes means
FIGURE = (480, 320)  # pixels that a card's figure may have
TAG = "card"  # of the cell whose figure stands for its lesson; without one it is the first figure


@dataclass(frozen=True)
class Lesson:
    """A row of README's table of lessons."""

    name: str
    """its notebook's name without .ipynb"""
    builds: str
    """Markdown"""
    minutes: str
    """Markdown"""


def lessons(readme: str) -> list[Lesson]:
    """The lessons of README's table, in its order."""
    return [Lesson(*row) for row in ROW.findall(readme)]


def title(notebook: nbformat.NotebookNode) -> str:
    """A lesson's first heading."""
    return notebook.cells[0].source.splitlines()[0].removeprefix("# ")


def figure(notebook: nbformat.NotebookNode) -> Image.Image:
    """The figure that stands for a lesson, on white, within FIGURE pixels.

    Raises:
        ValueError: the lesson shows none.
    """
    shown = []
    for cell in notebook.cells:
        pictures = [output.get("data", {}).get("image/png") for output in cell.get("outputs", [])]
        chosen = TAG in cell.metadata.get("tags", [])
        shown += [(not chosen, picture) for picture in pictures if picture]
    if not shown:
        raise ValueError(f"{title(notebook)} shows no figure; its card needs one")
    _, encoded = min(shown, key=lambda pair: pair[0])
    picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert(
        "RGB"
    )
    on_white.thumbnail(FIGURE)
    return on_white


def as_address(picture: Image.Image) -> str:
    """A picture as a data: address."""
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def card(lesson: Lesson) -> str:
    """Markdown of a lesson's card, for a grid of sphinx-design."""
    notebook = nbformat.read(FOLDER / f"{lesson.name}.ipynb", as_version=4)
    return f"""
````{{grid-item-card}} {title(notebook)}
:link: {lesson.name}
:link-type: doc
:img-top: {as_address(figure(notebook))}
:img-alt: A figure of lesson {lesson.name[:2]}

{lesson.builds[0].upper()}{lesson.builds[1:]}

```{{card-footer}}
Minutes: {lesson.minutes}
```
````
"""


class LessonCards(SphinxDirective):
    """A card for each lesson in README: its figure, what it builds, the minutes it takes."""

    def run(self) -> list[nodes.Node]:
        readme = README.read_text()
        found = lessons(readme)
        for path in (README, *(FOLDER / f"{lesson.name}.ipynb" for lesson in found)):
            self.env.note_dependency(str(path))
        cards = "".join(map(card, found))
        notes = "\n\n".join(NOTE.findall(readme))
        grid = f"`````{{grid}} 1 2 3 3\n:gutter: 3\n{cards}\n`````"
        return self.parse_text_to_nodes(f"{grid}\n\n{notes}\n")
