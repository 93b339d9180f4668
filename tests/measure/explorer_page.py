"""The ablation explorer's page with a thousand runs: how fast it opens and answers, and what axe-core says of it.

    npm install --prefix /tmp/axe axe-core
    python -m tests.measure.explorer_page --axe /tmp/axe/node_modules/axe-core/axe.min.js --pictures /tmp/pictures

The runs are invented. It also times the index of 300 run folders, ten of them with samples, read for the first time
and again. Needs chromium.
"""

import argparse
import dataclasses
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from playwright.sync_api import Browser, Page, sync_playwright

from pixnerd.explore import ablations
from pixnerd.explore.index import index
from pixnerd.recipes import RECIPES
from pixnerd.studies.study import expand, read_study

from ..explore import synthetic

SELECTION = "study=noise&measure=fd&switch=head&a=linear&b=field&columns=prediction&rows=ratio&at.prediction=v"
ANSWER = """([name, value]) => {
    const node = document.querySelector(`[data-key="${name}"]`), start = performance.now();
    if (value === null) node.click();
    else { node.value = value; node.dispatchEvent(new Event("change")); }
    document.body.getBoundingClientRect();  // the layout belongs to the answer
    return performance.now() - start;
}"""
STANDARDS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]


def time_folders(project: Path) -> None:
    """The index of 290 folders of a study and ten runs of none, which have samples."""
    path = synthetic.copy_study(project, seeds=list(range(9)))
    study = read_study(path)
    for run in expand(study, project / "runs" / "noise")[:290]:
        synthetic.make_run(run, study, np.random.default_rng(run.index))
    for number in range(10):
        config = dataclasses.replace(
            RECIPES["digits-cpu"], steps=2000, seed=number % 5, learning_rate=0.001 + number // 5
        )
        synthetic.add_samples(synthetic.loose_run(project, f"loose-{number}", config), 20 * number)
    for when in ("the first time", "again"):
        begin = time.perf_counter()
        found = index(project)
        runs = sum(len(entry["runs"]) for entry in found["studies"])
        print(f"index of 300 run folders {when}: {time.perf_counter() - begin:.2f} s ({runs} runs)")


def opened(browser: Browser, path: Path, width: int = 1280, scheme: str = "light") -> Page:
    context = browser.new_context(offline=True, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.on("pageerror", lambda error: print(f"ERROR: {error}"))
    page.on("console", lambda message: message.type == "error" and print(f"ERROR: {message.text}"))
    page.goto(f"file://{path}#{SELECTION}")
    page.wait_for_selector(".verdict")
    return page


def time_page(browser: Browser, path: Path) -> None:
    """How long it takes to open, and to answer each control twice."""
    page = opened(browser, path)
    entry = "performance.getEntriesByType('navigation')[0].domComplete"
    print(f"opens in {page.evaluate(entry):.0f} ms, {path.stat().st_size / 1e6:.1f} MB")
    waits = {}
    for name in page.evaluate("[...document.querySelectorAll('.controls select')].map((node) => node.dataset.key)"):
        options = page.locator(f"[data-key='{name}'] option").evaluate_all("(all) => all.map((one) => one.value)")
        first = page.locator(f"[data-key='{name}']").input_value()
        for value in [*(option for option in options if option != first), first]:
            waits[name, value] = page.evaluate(ANSWER, [name, value])
    for name in ("swap", "guess", "guess", "sort measures 1"):
        waits[name, ""] = page.evaluate(ANSWER, [name, None])
    slow = sorted(waits.items(), key=lambda entry: -entry[1])
    print(f"{len(waits)} answers, median {np.median(list(waits.values())):.0f} ms; the slowest:")
    for (name, value), wait in slow[:5]:
        print(f"  {name} {value}: {wait:.0f} ms")


def check(browser: Browser, path: Path, axe: str) -> None:
    """What axe-core finds, light and dark, wide and narrow, also with the outcome hidden."""
    for width, scheme in ((1280, "light"), (1280, "dark"), (380, "light"), (380, "dark")):
        for guessing in (False, True):
            page = opened(browser, path, width, scheme)
            if guessing:
                page.get_by_role("checkbox").check()
            for summary in page.locator("summary").all():
                summary.click()
            page.evaluate(axe)
            found = page.evaluate("(tags) => axe.run(document, {runOnly: tags})", STANDARDS)
            counts = f"{len(found['violations'])} violations, {len(found['passes'])} passes"
            print(f"{width} {scheme}{' guessing' * guessing}: {counts}")
            for violation in found["violations"]:
                print(f"  {violation['id']}: {violation['help']}; {violation['nodes'][0]['html'][:150]}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--axe", type=Path, help="axe.min.js of axe-core")
    parser.add_argument("--pictures", type=Path, help="folder for screenshots")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, sync_playwright() as browsers:
        project = Path(place)
        time_folders(project / "folders")
        synthetic.record(project, synthetic.copy_study(project), missing={5, 77})
        found = synthetic.with_more_seeds(index(project), 28)
        print(f"{len(found['studies'][0]['runs'])} runs")
        many, few = project / "many.html", project / "few.html"
        many.write_text(ablations.page(found))
        few.write_text(ablations.page(index(project)))
        browser = browsers.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        time_page(browser, many)
        if arguments.axe:
            check(browser, few, arguments.axe.read_text())
        for width, scheme in (
            ((1280, "light"), (1280, "dark"), (380, "light"), (380, "dark")) if arguments.pictures else ()
        ):
            page = opened(browser, few, width, scheme)
            page.wait_for_timeout(500)
            page.screenshot(path=arguments.pictures / f"{width}-{scheme}.png", full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
