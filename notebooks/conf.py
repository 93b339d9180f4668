"""The book: the lessons with their kept outputs, as web pages without a network (make book)."""

import sys
from importlib.resources import files
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from pixnerd.explore.ablations import SOURCE, STYLE, fragment
from pixnerd.explore.index import RECORDS, index

sys.path.insert(0, str(Path(__file__).parent))
from lesson_cards import LessonCards

project = "PixNerd workbook"
author = "the PixNerd workbook authors"
html_title = project
extensions = ["myst_nb", "sphinx_design"]
nb_execution_mode = "off"  # `make notebooks` executes them
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables that a cell prints are tables
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 2  # page.md#a-heading
exclude_patterns = ["exercises", "**.ipynb_checkpoints"]
html_theme = "sphinx_book_theme"
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is set
html_theme_options = {
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "use_download_button": True,
    "navbar_persistent": [],  # the search box of the sidebar is enough
    "secondary_sidebar_items": {"index": [], "**": ["page-toc"]},
}
html_css_files = ["book.css"]
html_js_files = ["book.js"]
html_show_search_summary = False  # it would fetch pages, which a browser forbids on a disk
html_copy_source = True
html_last_updated_fmt = None

# MathJax in one file that loads no other: formulas become SVG with their glyphs inside
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}  # the menu would load more
MATHJAX = files("sphinx-mathjax-offline") / "static" / "mathjax" / mathjax_path
html_static_path = [str(MATHJAX), "book.css", "book.js"]


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


def describe_figures(app: Sphinx, page: nodes.document) -> None:
    """What a screen reader says of a figure that a cell has drawn."""
    for image in page.findall(nodes.image):
        image.setdefault("alt", "Figure drawn by the code above")


def setup(app: Sphinx) -> None:
    app.add_directive("ablations", AblationsDirective)
    app.add_directive("lesson-cards", LessonCards)
    app.connect("source-read", offer_exercises)
    app.connect("doctree-read", describe_figures)
