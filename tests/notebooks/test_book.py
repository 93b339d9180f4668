"""The book as a class without a network reads it: built whole, opened from the disk, every page looked at."""

import base64
import importlib.util
import io
import re
import subprocess
import sys

import nbformat
import pytest
from PIL import Image

from ..conftest import offline_page
from .notebook_files import FOLDER, LESSONS, ROOT, read, solution_code, tags

PAGES = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in [*LESSONS, *FOLDER.glob("*.md")])
UNDRAWN = r"""() => {
    const texts = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT), found = [];
    while (texts.nextNode()) {
        if (!texts.currentNode.parentElement.closest("pre, code, script, style, mjx-container")
            && /\\[([]|\\[a-z]{2}|\|-+\|/.test(texts.currentNode.data)) found.push(texts.currentNode.data);
    }
    return found;
}"""


@pytest.fixture(scope="module")
def cards():
    """The module that makes the first page's cards."""
    spec = importlib.util.spec_from_file_location("lesson_cards", FOLDER / "lesson_cards.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """The folder with the book's pages, built as `make book` builds it."""
    place = tmp_path_factory.mktemp("book")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "-d", str(place / "doctrees")]
    done = subprocess.run([*command, str(FOLDER), str(place / "html")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return place / "html"


@pytest.fixture
def page(browser):
    """A phone's page in the dark scheme."""
    with offline_page(browser, 60_000, viewport={"width": 380, "height": 800}, color_scheme="dark") as page:
        yield page


def test_every_page_is_whole_without_a_network(book, page):
    """On a phone: formulas drawn, nothing wider than the page, pictures loaded and described, no table as text."""
    drawn = 0
    for name in PAGES:
        page.goto(f"file://{book / name}.html")
        page.evaluate("async () => await window.MathJax?.startup?.promise")
        formulas = page.locator("span.math, div.math").count()
        assert page.locator("mjx-container").count() >= formulas, name
        assert page.locator("mjx-merror").count() == 0, name
        assert page.evaluate(UNDRAWN) == [], name
        assert page.evaluate("document.documentElement.scrollWidth") <= 380, name
        pictures = page.locator("main img")
        pictures.evaluate_all("(all) => Promise.all(all.map((one) => { one.loading = 'eager'; return one.decode(); }))")
        descriptions = pictures.evaluate_all("(all) => all.map((one) => one.alt)")
        assert all(words and "_images" not in words for words in descriptions), name
        drawn += formulas
    assert drawn > 500


def test_search_works_from_the_disk_and_there_is_one_box(book, page):
    page.set_viewport_size({"width": 1280, "height": 900})
    page.goto(f"file://{book / 'index.html'}")
    box = page.locator(".search-button__button:visible")
    assert box.count() == 1
    box.click()
    field = page.locator("input[type=search]:visible")
    field.fill("Adams")
    field.press("Enter")
    page.locator("#search-results a", has_text="07 · Sampling").click()
    assert page.locator("h1").first.inner_text().startswith("07 · Sampling")
    assert "not set" not in page.inner_text("body")


def test_solutions_and_answers_are_folded(book, page):
    for path in LESSONS:
        wanted = [cell for cell in read(path).cells if {"solution", "answers"} & set(tags(cell))]
        if not wanted:
            continue
        page.goto(f"file://{book / path.stem}.html")
        assert page.locator("main details").count() >= len(wanted)
        assert page.locator("main details[open]").count() == 0
        shown = page.inner_text("main")
        for cell in wanted:
            if "solution" in tags(cell):
                last = solution_code(cell).strip().splitlines()[-1].strip()
                in_code = any(last in other.source for other in read(path).cells if other.cell_type == "code")
                assert in_code or last not in shown, f"{path.stem}: {cell.id}"


def test_every_notebook_can_be_downloaded_from_its_page(book):
    for path in LESSONS:
        (address,) = re.findall(r'<a href="(_sources/[^"]+\.ipynb)"', (book / f"{path.stem}.html").read_text())
        assert nbformat.reads((book / address).read_text(), as_version=4).cells == read(path).cells


def test_each_lesson_has_its_card(book, cards):
    """README's table, the first page's list and the cards name the same lessons; minutes and words are README's."""
    rows = cards.lessons((ROOT / "README.md").read_text())
    numbered = [path.stem for path in LESSONS if re.match(r"\d\d_", path.stem) and not path.stem.startswith("00")]
    listed = re.search(r":caption: Lessons\n:hidden:\n\n(.+?)\n```", (FOLDER / "index.md").read_text(), re.DOTALL)[1]
    assert [row.name for row in rows] == numbered == listed.split()
    first = (book / "index.html").read_text()
    made = re.findall(r'sd-card-img-top.+?href="(\w+)\.html"', first, re.DOTALL)
    assert made == numbered
    assert [words for words in re.findall(r"Minutes: (.+?)</p>", first)] == [
        row.minutes.replace("\\", "") for row in rows
    ]


def test_a_card_has_the_chosen_figure_or_the_first(cards):
    def cell(colour, *tags):
        file = io.BytesIO()
        Image.new("RGB", (960, 100), colour).save(file, "PNG")
        data = {"image/png": base64.b64encode(file.getvalue()).decode()}
        output = nbformat.v4.new_output("display_data", data)
        return nbformat.v4.new_code_cell("", outputs=[output], metadata={"tags": list(tags)})

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# 99 · Colours\n\nWords.")])
    with pytest.raises(ValueError, match="99 · Colours shows no figure"):
        cards.figure(notebook)
    notebook.cells += [cell("red"), cell("blue")]
    assert cards.figure(notebook).getpixel((0, 0)) == (255, 0, 0)
    notebook.cells[2].metadata.tags = ["card"]
    assert cards.figure(notebook).getpixel((0, 0)) == (0, 0, 255)
    assert cards.figure(notebook).size == (480, 50)


def test_the_picture_of_the_demo_is_small():
    assert (FOLDER / "images" / "demo.webp").stat().st_size < 150_000
