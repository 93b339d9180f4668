"""The picture of the demo in the book, notebooks/images/demo.webp: python -m tests.notebooks.demo_picture

Serves the demo with the model of runs/quickstart, draws sevens and takes the panel's picture. Needs chromium.
"""

import io
import shutil
import tempfile
from pathlib import Path

import papermill
from PIL import Image
from playwright.sync_api import sync_playwright

from ..explore.serving import voila
from .notebook_files import FOLDER, ROOT

PICTURE = FOLDER / "images" / "demo.webp"
DRAWN = "[...document.querySelectorAll('img.widget-image')].every((image) => image.naturalWidth > 100)"


def take(run: Path, path: Path) -> None:
    """Write the picture of a panel that has drawn sevens with the model of a run of digits to `path`."""
    with tempfile.TemporaryDirectory() as place, sync_playwright() as browsers:
        notebook = Path(place) / "demo.ipynb"
        (notebook.parent / run.name).symlink_to(run)  # the panel shows the run's name as it was given
        papermill.execute_notebook(FOLDER / notebook.name, notebook, {"run": run.name}, prepare_only=True)
        browser = browsers.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        with voila(notebook) as address:
            page = browser.new_page(viewport={"width": 940, "height": 900})
            page.set_default_timeout(300_000)  # the kernel imports torch
            page.goto(address)
            page.get_by_label("class").select_option("7")
            page.get_by_role("button", name="Draw").click()
            page.wait_for_function(DRAWN)
            shown = page.locator(".jp-OutputArea-output .widget-vbox").first.screenshot()
        browser.close()
    Image.open(io.BytesIO(shown)).convert("RGB").save(path, quality=85)


if __name__ == "__main__":
    take(ROOT / "runs" / "quickstart", PICTURE)
    print(f"{PICTURE}  {PICTURE.stat().st_size / 1000:.0f} kB")
