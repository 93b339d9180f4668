"""The page in a browser with the network off: the same numbers as Python's, and every control changes the picture."""

import base64
import csv
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from pixnerd.explore import ablations
from pixnerd.explore.index import index, measure_of
from pixnerd.recipes import RECIPES
from pixnerd.studies.compare import bootstrap_interval, sign_flip_p

from ..conftest import offline_page
from . import synthetic
from .controls import drawing, move_every_control

MODULE = f"data:text/javascript;base64,{base64.b64encode(ablations.SOURCE.read_bytes()).decode()}"
SELECTION = "study=noise&measure=fd&switch=head&a=linear&b=field&columns=prediction&rows=ratio&at.prediction=v"


@pytest.fixture(scope="module")
def page_file(recorded, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(ablations.page(index(recorded)))
    return path


@pytest.fixture
def page(browser):
    """A page on a desk, which may use the clipboard."""
    clipboard = "clipboard-read", "clipboard-write"
    with offline_page(browser, 10_000, clipboard, viewport={"width": 1280, "height": 900}) as page:
        yield page


@pytest.fixture
def opened(page, page_file):
    page.goto(f"file://{page_file}#{SELECTION}")
    page.wait_for_selector(".panel")
    return page


COLOURS = """() => {
    const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const corners = [...document.querySelectorAll(".sheets figure > canvas")].map((canvas) => {
        context.drawImage(canvas, 0, 0, 1, 1, 0, 0, 1, 1);
        return context.getImageData(0, 0, 1, 1).data;
    });
    return corners.every((corner) => corner[3] === 255) && corners.map((corner) => corner[0]);
}"""  # the red in the first pixel of each sheet, once all are drawn

FIRST_TILE = """(place) => {
    const canvas = document.querySelectorAll(".sheets figure > canvas")[place];
    const context = new OffscreenCanvas(64, 64).getContext("2d", { willReadFrequently: true });
    context.drawImage(canvas, 0, 0, 64, 64, 0, 0, 64, 64);
    const { data } = context.getImageData(0, 0, 64, 64);
    return data[3] === 255 && [...data];
}"""  # the first sample of a sheet, once it is drawn
SHOWN_COLOURS = """(root) => {
    const below = (node) => {
        const colour = getComputedStyle(node).backgroundColor;
        return colour === "rgba(0, 0, 0, 0)" ? below(node.parentElement) : colour;
    };
    return [...root.querySelectorAll(":not(option, optgroup, script, style)")].flatMap((node) => {
        const style = getComputedStyle(node), name = node.getAttribute("class") ?? node.localName;
        const words = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
        if (!node.checkVisibility()) return [];
        if (node.matches(".curve, .frontier, .mean")) return [[name, 3, style.stroke, below(node)]];
        if (node.matches(".mark, .best, .difference")) return [[name, 3, style.fill, below(node)]];
        if (node.matches("text")) return [[name, 4.5, style.fill, below(node)]];
        return words && !node.matches("svg *") ? [[name, 4.5, style.color, below(node)]] : [];
    });
}"""  # of every text and mark: its name, the contrast that it needs, its colour and the one below it


def in_browser(page, expression, value=None):
    """The value of an expression of the module `m` and a value `v`."""
    return page.evaluate(
        f"async ([source, v]) => {{ const m = await import(source); return {expression}; }}", [MODULE, value]
    )


# --- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("high", "count"), [(1, 5), (2, 999), (6, 60), (7, 1000), (100, 1000)])
def test_random_numbers_are_numpys(page, high, count):
    expected = np.random.default_rng(0).integers(high, size=count)
    assert in_browser(page, "[...m.seededIntegers(...v)]", [high, count]) == expected.tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 6, 16, 17, 40])
def test_interval_and_p_are_those_of_python(page, count):
    differences = np.random.default_rng(count).normal(0.3, 1.0, count)
    low, high, p = in_browser(page, "[...m.bootstrapInterval(v), m.signFlipP(v)]", differences.tolist())
    assert (low, high) == pytest.approx(bootstrap_interval(differences), rel=1e-9)
    assert p == pytest.approx(sign_flip_p(differences), abs=1e-12)


def test_comparisons_verdicts_and_commands_are_those_of_python(page, recorded):
    found = index(recorded)
    (study,) = found["studies"]
    cases = [
        {"axis": axis, "a": a, "b": b, "fixed": fixed, "measure": measure}
        for axis, a, b, fixed in (
            ("head", "linear", "field", {"prediction": "v", "ratio": "1.5"}),
            ("head", "shared", "field", {"prediction": "x", "ratio": "0.4"}),
            ("head", "linear", "shared", {"prediction": "x", "ratio": "1.5"}),
            ("prediction", "x", "v", {"head": "linear", "ratio": "1.5"}),
            ("ratio", "0.4", "1.5", {"head": "field", "prediction": "v"}),
        )
        for measure in found["measures"]
    ]
    expression = """v.cases.map((c) => {
        const study = v.index.studies[0], found = m.compare(m.pairsOf(study, c, c.fixed, c.measure));
        return [found, m.verdict(found, v.index.measures[c.measure]), m.commandOf(study, c, c.fixed)];
    })"""
    words = set()
    for case, (numbers, said, command) in zip(
        cases, in_browser(page, expression, {"cases": cases, "index": found}), strict=True
    ):
        switch = [case[name] for name in ("axis", "a", "b")]
        expected = ablations.compared(study, *switch, case["measure"], case["fixed"])
        assert numbers == pytest.approx(expected._asdict(), rel=1e-9, abs=1e-12)
        assert said == ablations.verdict(expected, case["measure"])
        assert command == ablations.command(study, *switch, case["fixed"])
        words.add(said)
    assert {"better", "worse", "undecided with 5 seeds", "undecided with 6 seeds"} <= words


def test_the_frontier_has_the_points_that_none_beats(page):
    random = np.random.default_rng(2)
    points = [{"x": float(x), "y": float(y)} for x, y in random.integers(0, 12, (60, 2))]
    for better, sign in (("lower", 1), ("higher", -1)):
        found = in_browser(page, "m.frontier(...v)", [points, better])
        beaten = [
            any(
                o["x"] <= p["x"] and sign * o["y"] <= sign * p["y"] and (o["x"], o["y"]) != (p["x"], p["y"])
                for o in points
            )
            for p in points
        ]
        expected = {(p["x"], p["y"]) for p, worse in zip(points, beaten, strict=True) if not worse}
        assert {(p["x"], p["y"]) for p in found} == expected
        assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (-0.12345, "−0.123"), (1234.56, "1235"), (99.96, "100"), (1e-7, "1.0e−7"), (12345678, "1.2e+7")],
)
def test_numbers_for_people(page, value, shown):
    assert in_browser(page, "m.number(v)", value) == shown


def test_ticks_are_round_and_within(page):
    for low, high in ((0, 1), (0.337, 0.412), (-3, 977), (1e-5, 1.2e-5)):
        found = in_browser(page, "m.ticks(...v, 5)", [low, high])
        assert 2 <= len(found) <= 7
        assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in found)


def test_csv_quotes_what_it_must(page):
    rows = [["a", 'say "x"', "b,c"], [1, 0.5, "two\nlines"]]
    assert in_browser(page, "m.asCsv(v)", rows) == 'a,"say ""x""","b,c"\n1,0.5,"two\nlines"\n'


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_flip_shows_every_pair_and_says_what_python_says(opened, recorded):
    (study,) = index(recorded)["studies"]
    panels = opened.locator(".panel")
    assert panels.count() == 4
    for place, (ratio, prediction) in enumerate((r, p) for r in ("0.4", "1.5") for p in ("v", "x")):
        fixed = {"prediction": prediction, "ratio": ratio}
        expected = ablations.compared(study, "head", "linear", "field", "fd", fixed)
        panel = panels.nth(place)
        assert panel.locator(".mark.a").count() == panel.locator(".mark.b").count() == expected.pairs
        words = ablations.verdict(expected, "fd")
        assert panel.locator(".verdict").inner_text() == (words if words.startswith("undecided") else f"B is {words}")
        assert panel.text_content().startswith(f"prediction {prediction}, ratio {ratio}: ")


def test_every_control_changes_the_picture(opened):
    move_every_control(opened)


def test_swapping_the_sides_swaps_the_verdicts(opened):
    before = opened.locator(".verdict").all_inner_texts()
    opened.get_by_role("button", name="swap A and B").click()
    after = opened.locator(".verdict").all_inner_texts()
    words = {"B is better": "B is worse", "B is worse": "B is better"}
    assert after == [words.get(said, said) for said in before]
    assert "B is worse" in after


def test_a_panel_is_chosen_by_keyboard_and_keeps_the_focus(opened):
    panel = opened.locator(".panel").first
    panel.focus()
    opened.keyboard.press("Enter")
    assert opened.locator(".panel").first.get_attribute("aria-pressed") == "true"
    assert opened.evaluate("document.activeElement.classList.contains('panel')")
    assert "at prediction v, ratio 0.4" in opened.locator(".curves h3").inner_text()
    assert "at.prediction=v" in opened.url


def test_jupyterlab_takes_no_key_of_a_control(opened):
    """In command mode it would, "b" inserts a cell, unless the very element that has the focus says otherwise."""
    script = "(all) => all.map((one) => one.dataset.lmSuppressShortcuts)"
    found = opened.locator(".ablations :is(button, input, select, summary, [tabindex])").evaluate_all(script)
    assert len(found) > 20
    assert set(found) == {"true"}


def test_prediction_comes_first_and_the_score_is_kept(opened, page_file):
    opened.locator(".panel").first.click()  # ratio 0.4, prediction v: the field is better
    opened.get_by_role("checkbox").check()
    assert opened.locator(".verdict").count() == 0
    assert (
        opened.locator(".curves, .samples, .cost, .table").evaluate_all("(all) => all.map((one) => one.innerHTML)")
        == [""] * 4
    )
    opened.get_by_role("button", name="B is better").click()
    assert opened.locator(".verdict").all_inner_texts() == ["B is better"]
    assert "As you predicted." in opened.locator(".told").inner_text()
    opened.locator(".panel").nth(2).click()
    opened.get_by_role("button", name="A is better").click()
    assert "Not as you predicted." in opened.locator(".told").inner_text()
    opened.reload()
    assert "predict first (1 of 2 right)" in opened.locator(".toggle").inner_text()


def test_the_wipe_moves_by_keyboard(opened):
    slider = opened.get_by_role("slider")
    slider.focus()
    before = opened.locator(".stack").screenshot()
    for _ in range(40):
        opened.keyboard.press("ArrowLeft")
    assert slider.input_value() == "10"
    assert opened.locator(".stack").screenshot() != before


def test_samples_are_enlarged_by_whole_pixels(opened):
    sizes = opened.locator(".sheets canvas").evaluate_all(
        "(all) => all.map((one) => [one.width, one.clientWidth, one.clientHeight])"
    )
    assert sizes == [[265, 265, 265]] * 4
    colours = opened.locator(".sheets canvas").first.evaluate(
        "(one) => { const d = one.getContext('2d').getImageData(0, 0, 64, 64).data;"
        "return new Set(Array.from({length: 4096}, (_, i) => d.slice(4 * i, 4 * i + 3).join())).size }"
    )
    assert 1 < colours <= 32 * 32  # no colour that the stored sample lacks


def test_tables_are_sorted_and_copied(opened):
    opened.locator("summary", has_text="behind the picture").click()
    opened.get_by_role("button", name="B − A").nth(1).click()
    values = opened.locator("details td.number:last-child").all_inner_texts()
    numbers = [float(value.replace("−", "-")) for value in values]
    assert numbers == sorted(numbers)
    opened.get_by_role("button", name="B − A").nth(1).click()
    assert opened.locator("details td.number:last-child").all_inner_texts() == values[::-1]
    opened.get_by_role("button", name="copy as CSV").nth(1).click()
    opened.get_by_role("button", name="copied").wait_for()
    lines = opened.evaluate("navigator.clipboard.readText()").splitlines()
    assert lines[0] == "prediction,ratio,seed,A linear,B field,B − A"
    assert len(lines) == 1 + len(numbers)


def test_a_link_opens_the_same_view(opened, page_file):
    opened.locator(".panel").nth(1).click()
    opened.get_by_role("button", name="copy a link to this view").click()
    opened.get_by_role("button", name="copied").wait_for()
    link, before = opened.evaluate("navigator.clipboard.readText()"), drawing(opened)
    opened.goto("about:blank")
    opened.goto(link)
    opened.wait_for_selector(".panel")
    assert drawing(opened)[0] == before[0]


@pytest.mark.parametrize(
    "address", ["#", "#study=other&measure=x&switch=y&a=q&b=q&at.z=1", "#columns=none&rows=none", "#%%%=1"]
)
def test_any_address_opens(page, page_file, address):
    page.goto(f"file://{page_file}{address}")
    page.wait_for_selector(".verdict")


def test_missing_runs_and_what_was_left_out_are_told(page, recorded, tmp_path):
    found = index(recorded)
    found["left_out"].append({"where": "runs/<b>", "why": "it is damaged"})
    (tmp_path / "page.html").write_text(ablations.page(found))
    page.goto(f"file://{tmp_path}/page.html#{SELECTION}")
    page.locator("summary", has_text="2 runs of these two values not made yet").click()
    assert "3: linear, x, 1.5, seed 0" in page.locator(".missing").inner_text()
    assert page.get_by_role("button", name="train").count() == 0  # there is no kernel
    page.locator("summary", has_text="1 folder left out").click()
    assert "runs/<b> it is damaged" in page.locator(".left").inner_text()


def test_other_projects_open(page, tmp_path):
    """No study; a study that nobody made; one run of no study; many of them."""
    base = dataclasses.replace(RECIPES["digits-cpu"], steps=100)
    path = tmp_path / "page.html"

    def show(text):
        path.write_text(ablations.page(index(tmp_path)))
        page.goto("about:blank")
        page.goto(f"file://{path}")
        page.get_by_text(text).first.wait_for()

    show("No study has runs or a record yet.")
    synthetic.loose_run(tmp_path, "one", base)
    show("There is one arm, and nothing to compare it with.")
    for seed in (1, 2):
        synthetic.loose_run(tmp_path, f"one-{seed}", dataclasses.replace(base, seed=seed))
    for seed in (0, 1, 2):
        synthetic.loose_run(
            tmp_path, f"fast-{seed}", dataclasses.replace(base, seed=seed, learning_rate=0.02), loss=0.3 + seed / 100
        )
    show("A: learning_rate 0.02")
    assert page.locator(".mark.a").count() >= 3
    synthetic.copy_study(tmp_path)
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    show("no pair of runs")


def test_a_study_of_one_arm_shows_it_alone(page, tmp_path):
    path = synthetic.copy_study(tmp_path, name="one", axes={"head": {"field": {}}}, seeds=[0, 1])
    synthetic.record(tmp_path, path)
    (tmp_path / "page.html").write_text(ablations.page(index(tmp_path)))
    page.goto(f"file://{tmp_path}/page.html")
    page.get_by_text("There is one arm, and nothing to compare it with.").wait_for()
    assert page.locator(".sheets figcaption").all_inner_texts() == ["A: head field"]
    assert page.locator(".curves figure").count() > 0
    assert page.locator("pre").inner_text() == "pixnerd sweep data/ablations/one/one.yaml --index 0 1"
    assert "undefined" not in page.locator("body").inner_text()
    assert page.locator("[data-key='swap']").count() == 0


def test_runs_of_no_study_show_samples_and_do_not_claim_the_same_noise(page, tmp_path):
    base = dataclasses.replace(RECIPES["digits-cpu"], steps=100)
    runs = [
        synthetic.loose_run(tmp_path, f"run-{rate}", dataclasses.replace(base, learning_rate=rate))
        for rate in (0.1, 0.2, 0.3)
    ]
    for run, colour in zip(runs[:2], (40, 220), strict=True):
        synthetic.add_samples(run, colour)
    (tmp_path / "page.html").write_text(ablations.page(index(tmp_path)))
    page.goto(f"file://{tmp_path}/page.html#switch=learning_rate&a=0.1&b=0.2")
    page.wait_for_selector(".sheets canvas")
    assert page.locator(".sheets figcaption").all_inner_texts()[:2] == ["A: learning_rate 0.1", "B: learning_rate 0.2"]
    assert page.locator(".stack canvas").count() == 2
    first, second = page.wait_for_function(COLOURS).json_value()
    assert first < 120 < second
    assert "they may be asked for other things" in page.locator(".samples .note").inner_text()
    page.locator("[data-key='select b']").select_option("0.3")
    assert "no samples kept" in page.locator(".sheets").inner_text()


def test_a_small_dark_screen_holds_everything(browser, page_file):
    context = browser.new_context(offline=True, viewport={"width": 380, "height": 800}, color_scheme="dark")
    page = context.new_page()
    page.goto(f"file://{page_file}#{SELECTION}")
    page.wait_for_selector(".panel")
    assert page.evaluate("document.documentElement.scrollWidth") == 380
    background = page.locator("html").evaluate("(node) => getComputedStyle(node).backgroundColor")
    assert background == "rgb(21, 24, 28)"
    context.close()


def test_the_index_says_how_measures_are_read(recorded):
    found = index(recorded)
    assert json.loads(json.dumps(found["measures"]["fd"])) == {
        "title": "FD",
        "better": "lower",
        "group": "quality",
        "counted": False,
    }
    assert next(iter(found["measures"])) == "velocity_error"
    assert measure_of("fd").title == "FD"


# --- what is drawn and told is what Python computes ------------------------------------------------------------------


def choose(page, **values):
    """Set lists of the controls, by their names."""
    for name, value in values.items():
        page.locator(f"[data-key='select {name}']").select_option(value)


def copied(page, name):
    """The rows of a table as its button copies them, the titles first."""
    button = page.locator(f"[data-key='copy {name}']")
    button.click()
    page.wait_for_function("(button) => button.textContent === 'copied'", arg=button.element_handle())
    return list(csv.reader(io.StringIO(page.evaluate("navigator.clipboard.readText()"))))


def test_the_tables_and_their_copies_hold_what_python_computes(opened, recorded):
    found = index(recorded)
    (study,) = found["studies"]
    expected = [
        [*(run["choices"][1:]), run["repeat"], *(side["measures"]["fd"] for side in (run, other))]
        for run, other in ablations.pairs(study, "head", "linear", "field")
    ]
    opened.locator("summary", has_text="behind the picture").click()
    titles, *rows = copied(opened, "pairs")
    assert titles == ["prediction", "ratio", "seed", "A linear", "B field", "B − A"]
    assert sorted(row[:3] for row in rows) == sorted(row[:3] for row in expected)
    values = {tuple(row[:3]): [float(text) for text in row[3:]] for row in rows}
    for *place, a, b in expected:
        assert values[tuple(place)] == pytest.approx([a, b, b - a])
    titles, *rows = copied(opened, "measures")
    assert titles == ["measure", "B − A", "95 % from", "to", "p", "pairs", "B is"]
    assert [row[0] for row in rows] == [measure["title"] for measure in found["measures"].values()]
    for name, row in zip(found["measures"], rows, strict=True):
        comparison = ablations.compared(study, "head", "linear", "field", name, {"prediction": "v", "ratio": "1.5"})
        assert [float(text) for text in row[1:6]] == pytest.approx(list(comparison[:5]))
        assert row[6] == ablations.verdict(comparison, name)


@pytest.mark.parametrize("name", ["measures", "pairs"])
def test_a_copy_is_in_the_order_that_is_shown(opened, name):
    opened.locator("summary", has_text="behind the picture").click()
    for column, as_number in ((1, name == "measures"), (4, True)):
        for descending in (False, True):
            opened.locator(f"[data-key='sort {name} {column}']").click()
            rows = copied(opened, name)[1:]
            values = [float(row[column]) if as_number else row[column] for row in rows]
            assert values == sorted(values, reverse=descending)
            table = opened.locator(f"[aria-label='table of {name}'] tbody tr")
            assert table.locator("td:first-child").all_inner_texts() == [row[0] for row in rows]


def test_the_drawing_has_the_sign_and_the_place_of_the_difference(opened, recorded):
    """Against the pixels of the axis: the marks, the means, the dot of the difference and the ends of its interval."""
    (study,) = index(recorded)["studies"]
    script = """(svg) => {
        const y = (name, place = "y2") => +svg.querySelector(name).getAttribute(place);
        const dot = y("circle.difference", "cy"), bar = [y(".bar", "y1"), y(".bar")];
        const marks = [...svg.querySelectorAll(".mark.a")].map((mark) => +mark.getAttribute("cy"));
        return { a: y(".zero"), b: y("line.mean"), dot, bar, marks };
    }"""
    for place, (ratio, prediction) in enumerate((r, p) for r in ("0.4", "1.5") for p in ("v", "x")):
        fixed = {"prediction": prediction, "ratio": ratio}
        drawn = opened.locator(".panel").nth(place).locator("svg").evaluate(script)
        comparison = ablations.compared(study, "head", "linear", "field", "fd", fixed)
        pixels = (drawn["b"] - drawn["a"]) / comparison.mean  # of one unit of the measure; upwards they become fewer
        assert pixels < 0
        assert drawn["dot"] == pytest.approx(drawn["b"])
        ends = [drawn["a"] + pixels * end for end in (comparison.low, comparison.high)]
        assert drawn["bar"] == pytest.approx(ends, abs=0.1)
        assert np.mean(drawn["marks"]) == pytest.approx(drawn["a"], abs=0.1)


@pytest.mark.parametrize(("measure", "better"), [("fd", "lower"), ("class_agreement", "higher")])
def test_the_stairs_join_the_arms_that_none_beats(opened, recorded, measure, better):
    choose(opened, measure=measure)
    (study,) = index(recorded)["studies"]
    sign = {"lower": 1, "higher": -1}[better]
    for place, costs in enumerate(("seconds_per_step", "activations_mib", "parameters")):
        arms = {}
        for run in study["runs"]:
            if run["choices"][2] == "1.5":
                arms.setdefault(" ".join(run["choices"][:2]), []).append(run["measures"])
        points = {arm: [np.mean([r[name] for r in rows]) for name in (costs, measure)] for arm, rows in arms.items()}
        best = [
            arm
            for arm, (x, y) in sorted(points.items(), key=lambda point: point[1])
            if not any(u <= x and sign * v <= sign * y and (u, v) != (x, y) for u, v in points.values())
        ]
        figure = opened.locator(".cost figure").nth(place)
        assert figure.locator(".note").inner_text() == f"On the frontier: {'; '.join(best)}"
        stairs = figure.locator(".frontier").get_attribute("d")
        assert re.fullmatch(r"M[\d.]+ [\d.]+(H[\d.]+V[\d.]+)*", stairs)
        heights = [float(height) for height in re.findall(r"(?: |V)([\d.]+)", stairs)]
        assert len(heights) == len(best)
        assert heights == sorted(heights, reverse=better == "higher")  # pixels from the top
    side = {"lower": "the bottom", "higher": "the top"}[better]
    assert f"towards the left and {side} is better" in opened.locator(".cost > .note").inner_text()


def test_the_legend_says_which_way_is_better(opened):
    for measure, words in (("fd", "lower is"), ("class_agreement", "higher is"), ("sharpness", "neither way is")):
        choose(opened, measure=measure)
        assert f"({words} better)" in opened.locator(".legend .measured").inner_text()


def test_curves_and_samples_are_those_of_the_panel_in_focus(opened, recorded):
    (study,) = index(recorded)["studies"]
    for place, prediction in enumerate("vx"):
        opened.locator(".panel").nth(place).click()
        losses = [run["curves"]["loss"][-1] for run in study["runs"] if run["choices"] == ["linear", prediction, "0.4"]]
        title = opened.locator(".curves svg").first.locator(".mark.a title").text_content()
        assert float(title.removeprefix("A ends at ")) == pytest.approx(np.mean(losses), rel=5e-3)
        for canvas, head in enumerate(("linear", "field")):
            source = study["sheets"][f"{head}-{prediction}-0.4"].partition(",")[2]
            stored = np.asarray(Image.open(io.BytesIO(base64.b64decode(source))))[1:17, 1:17]
            shown = opened.wait_for_function(FIRST_TILE, arg=canvas).json_value()
            assert (np.array(shown, np.uint8).reshape(64, 64, 4)[::4, ::4, :3] == stored).all()


# --- predict first: nothing tells -------------------------------------------------------------------------------------


def test_nothing_tells_what_is_to_be_predicted(opened, recorded):
    (study,) = index(recorded)["studies"]
    opened.locator("summary", has_text="behind the picture").click()
    opened.get_by_role("checkbox").check()
    assert opened.locator("p[aria-live]").text_content() == ""
    assert opened.locator(".panel svg, .panel .figures").count() == 0
    opened.get_by_role("button", name="B is better").click()
    fixed = {"prediction": "v", "ratio": "1.5"}
    comparison = ablations.compared(study, "head", "linear", "field", "fd", fixed)
    assert f"The {comparison.pairs} pairs behind the picture" in opened.locator(".table summary").inner_text()
    assert {tuple(row[:2]) for row in copied(opened, "pairs")[1:]} == {("v", "1.5")}
    assert [panel.locator("svg").count() for panel in opened.locator(".panel").all()] == [0, 0, 1, 0]
    marks = opened.locator(".panel .mark").evaluate_all(
        "(all) => all.map((one) => one.getBBox()).map((box) => box.y + box.height / 2)"
    )
    bar = opened.locator(".panel .bar")
    ends = [float(bar.get_attribute(name)) for name in ("y1", "y2")]
    spread = max(*marks, *ends) - min(*marks, *ends)
    assert spread == pytest.approx(164 / 1.12, abs=0.5)  # the scale is that of this panel alone, with 6 % on both sides
    frontiers = opened.locator(".cost figure .note").all_inner_texts()  # of the arms of the guessed panel alone
    assert len(frontiers) == 3
    for names in frontiers:
        assert {name.split()[-1] for name in names.removeprefix("On the frontier: ").split("; ")} == {"v"}
    choose(opened, measure="kid")
    assert opened.locator(".verdict").count() == 0


@pytest.mark.parametrize("measure", ["fd", "class_agreement", "sharpness"])
def test_a_guess_is_right_if_it_says_what_python_says(opened, recorded, measure):
    (study,) = index(recorded)["studies"]
    choose(opened, measure=measure)
    comparison = ablations.compared(study, "head", "linear", "field", measure, {"prediction": "v", "ratio": "1.5"})
    words = ablations.verdict(comparison, measure)
    assert words == {"sharpness": "lower"}.get(measure, "better")
    opened.get_by_role("checkbox").check()
    opened.get_by_role("button", name="A is higher" if measure == "sharpness" else "B is better").click()
    assert opened.locator(".told").inner_text() == "As you predicted."
    assert opened.evaluate("document.activeElement.matches('.panel[aria-pressed=true]')")


# --- focus, slider and colours ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["sort measures 1", "sort pairs 3", "swap", "guess"])
def test_a_control_that_is_used_by_keyboard_keeps_the_focus(opened, key):
    opened.locator("summary", has_text="behind the picture").click()
    before = drawing(opened)
    opened.locator(f"[data-key='{key}']").focus()
    opened.keyboard.press("Space")
    assert drawing(opened) != before
    assert opened.evaluate("document.activeElement.dataset.key") == key


def test_the_slider_stays_where_it_was_when_the_page_is_drawn_again(opened):
    opened.get_by_role("slider").fill("10")
    opened.locator("[data-key='swap']").click()
    assert opened.get_by_role("slider").input_value() == "10"
    assert opened.locator(".stack").evaluate("(node) => node.style.getPropertyValue('--share')") == "10%"


def luminance(colour):
    """The relative luminance of "rgb(r, g, b)", as WCAG defines it."""
    parts = np.array([int(part) for part in re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour).groups()]) / 255
    return float(np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_marks_stand_out_from_what_is_below_them(browser, page_file, scheme):
    context = browser.new_context(offline=True, color_scheme=scheme)
    page = context.new_page()
    page.goto(f"file://{page_file}#{SELECTION}")
    page.wait_for_selector(".panel")
    shown = page.locator(".ablations").evaluate(SHOWN_COLOURS)
    page.locator("[data-key='swap']").click()  # what was better is worse then
    shown += page.locator(".ablations").evaluate(SHOWN_COLOURS)
    context.close()
    names = {name for name, *_ in shown}
    assert {"verdict better", "verdict worse", "verdict undecided", "side a", "side b", "mark a", "mark b"} <= names
    assert {"curve a", "curve b", "tick", "note", "best", "frontier"} <= names
    for name, least, *colours in shown:
        dark, light = sorted(map(luminance, colours))
        assert (light + 0.05) / (dark + 0.05) >= least, (name, *colours)
