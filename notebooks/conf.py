"""The book: the lessons with the outputs that they are kept with, as web pages (make book)."""

from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from pixnerd.explore.ablations import SOURCE, STYLE, fragment
from pixnerd.explore.index import RECORDS, index

project = "PixNerd workbook"
html_title = project
extensions = ["myst_nb"]
nb_execution_mode = "off"  # `make notebooks` executes them
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 2  # page.md#a-heading
exclude_patterns = ["exercises", "**.ipynb_checkpoints"]
html_theme = "sphinx_book_theme"
html_theme_options = {"home_page_in_toc": True, "show_toc_level": 2, "use_download_button": True}
html_copy_source = True
html_last_updated_fmt = None


class AblationsDirective(Directive):
    """The ablation explorer with every study that has a record."""

    def run(self) -> list[nodes.Node]:
        root = Path(__file__).parents[1]
        for path in (SOURCE, STYLE, *(root / RECORDS).rglob("*")):
            self.state.document.settings.env.note_dependency(str(path))
        return [nodes.raw("", fragment(index(root, own=False)), format="html")]


def offer_exercises(app: Sphinx, page: str, source: list[str]) -> None:
    """Exercises are no pages of the book: a link to one is a download."""
    source[0] = source[0].replace("](exercises/", "](path:exercises/")


def setup(app: Sphinx) -> None:
    app.add_directive("ablations", AblationsDirective)
    app.connect("source-read", offer_exercises)
