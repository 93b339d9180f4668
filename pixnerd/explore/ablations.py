"""What flipping one switch does: pairs of runs, what they say, and a page that shows it (`ablations.js` draws it).

The functions work on the index of `index.py`, need neither torch nor widgets, and compute what the page computes.
"""

import base64
import json
import re
import shlex
from pathlib import Path

from ..errors import InputError
from ..files import check_output_file, write_atomically
from ..studies.compare import Comparison, Row, paired
from ..studies.sheet import QUALITIES, lossy
from .index import Entry, Index, index, measure_of, picture_url

SURE = 0.05  # p up to which a difference is decided, if its interval leaves out 0 as well
LARGEST = 6_000_000  # bytes of a page
SOURCE, STYLE = (Path(__file__).with_name(f"ablations.{kind}") for kind in ("js", "css"))
PAGE = """:root { color-scheme: light dark; background: light-dark(#ffffff, #15181c); }
body { max-width: 1240px; margin: 0 auto; padding: 20px 20px 0; }
h1 { margin: 0; color: light-dark(#1b1f24, #e8eaed); font: 650 26px/1.2 system-ui, "DejaVu Sans", sans-serif; }
@media (max-width: 600px) { body { padding: 14px 12px 0; } }
"""


def verdict(found: Comparison, measure: str) -> str:
    """What a comparison says of its second value.

    Returns:
        "better" or "worse"; "higher" or "lower" for a measure of which neither is better; "no difference", where every
        pair is equal; or "undecided with N seeds", unless p ≤ 0.05 and the interval leaves out 0.
    """
    known = measure_of(measure)
    if found.mean == found.low == found.high == 0:
        return "no difference"
    if not known.counted and (found.p > SURE or found.low <= 0 <= found.high):
        return f"undecided with {found.seeds} {'seed' if found.seeds == 1 else 'seeds'}"
    side = "higher" if found.mean > 0 else "lower"
    if not known.better:
        return side
    return "better" if side == known.better else "worse"


def choices_of(study: Entry, run: Entry) -> dict[str, str]:
    """Axis → the value that a run of a study has."""
    return dict(zip(study["axes"], run["choices"], strict=True))


def only_switch(study: Entry, first: Entry, second: Entry) -> str:
    """The one axis in which two runs of a study differ.

    Raises:
        InputError: they differ in nothing, in the seed, or in a second axis, which is named.
    """
    before, after = ({**choices_of(study, run), study["repeat"]: run["repeat"]} for run in (first, second))
    differing = [name for name in before if before[name] != after[name]]
    named = f"runs {first['index']} and {second['index']} of {study['name']}"
    if not differing:
        raise InputError(f"{named} differ in nothing")
    if len(differing) > 1:
        one, two = (f"{name} ({before[name]}, {after[name]})" for name in differing[:2])
        raise InputError(f"{named} differ in {one} and also in {two}; a pair differs in one switch alone")
    if differing == [study["repeat"]]:
        raise InputError(f"{named} differ in the {study['repeat']} alone, which is no switch")
    return differing[0]


def pairs(study: Entry, axis: str, a: str, b: str) -> list[tuple[Entry, Entry]]:
    """Every pair of runs with values a and b of an axis that agree in all other axes and in the seed.

    Raises InputError if the study has no such axis or value.
    """
    _check_switch(study, axis, a, b)
    place = list(study["axes"]).index(axis)
    sides: dict[str, dict[tuple[str, ...], Entry]] = {a: {}, b: {}}
    for run in study["runs"]:
        value = run["choices"][place]
        if value in sides:
            rest = (*run["choices"][:place], *run["choices"][place + 1 :], run["repeat"])
            sides[value][rest] = run
    return [(run, sides[b][rest]) for rest, run in sides[a].items() if rest in sides[b]]


def compared(study: Entry, axis: str, a: str, b: str, measure: str, fixed: dict[str, str]) -> Comparison:
    """The paired comparison b − a of a measure, over those runs of a study that have the choices `fixed`.

    Raises InputError if there is no pair, or no such axis or value.
    """
    _check_switch(study, axis, a, b)
    rows = [Row(run["index"], choices_of(study, run), run["repeat"], run["measures"]) for run in study["runs"]]
    return paired([row for row in rows if fixed.items() <= row.choices.items()], axis, a, b, measure)


def command(study: Entry, axis: str, a: str, b: str, fixed: dict[str, str]) -> str:
    """The shell command that makes all runs on both sides of a comparison, those that are missing too.

    Raises InputError if there is none, or no such axis or value.
    """
    _check_switch(study, axis, a, b)
    chosen = []
    for run in (*study["runs"], *study["missing"]):
        choices = choices_of(study, run)
        if choices[axis] in (a, b) and fixed.items() <= choices.items():
            chosen.append(run)
    if not chosen:
        raise InputError(f"no run of {study['name']} has {axis} {a} or {b} there")
    chosen.sort(key=lambda run: run["index"])
    if study["loose"]:
        return "\n".join(run["command"] for run in chosen)
    file = study["file"] or f"{study['name']}.yaml"
    return f"pixnerd sweep {shlex.quote(file)} --index {' '.join(str(run['index']) for run in chosen)}"


def _check_switch(study: Entry, axis: str, a: str, b: str) -> None:
    if axis not in study["axes"]:
        raise InputError(f"switch is {axis!r}; {study['name']} has {', '.join(study['axes'])}")
    for value in (a, b):
        if value not in study["axes"][axis]:
            raise InputError(f"{axis} is {value!r}; {study['name']} has {', '.join(study['axes'][axis])}")
    if a == b:
        raise InputError(f"{axis} is {a!r} twice; a comparison needs two values")


# --- pages without a kernel ------------------------------------------------------------------------------------------


def fragment(found: Index) -> str:
    """HTML that shows an index wherever it is put: the style, an element, and the module with the index."""
    content = json.dumps(found, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    call = 'showIndex(document.getElementById("ablations"), document.getElementById("ablations-index"));'
    return (
        f"<style>\n{STYLE.read_text()}</style>\n"
        '<div id="ablations"><noscript>This page draws its figures with JavaScript.</noscript></div>\n'
        f'<script type="application/json" id="ablations-index">{content}</script>\n'
        f'<script type="module">\n{SOURCE.read_text()}\n{call}\n</script>\n'
    )


def page(found: Index) -> str:
    """A page of its own that needs no network.

    Raises InputError if it would be larger than 6 MB even with its pictures compressed.
    """
    head = '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    head += '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
    head += f"<title>Flip one switch</title>\n<style>\n{PAGE}</style>\n</head>\n<body>\n"
    head += "<h1>Flip one switch</h1>\n<main>\n"
    for quality in (None, *QUALITIES):
        text = (
            f"{head}{fragment(found if quality is None else with_smaller_pictures(found, quality))}</main>\n</body>\n"
        )
        text += "</html>\n"
        if (size := len(text.encode())) <= LARGEST:
            return text
    raise InputError(f"the page would have {size / 1e6:.1f} MB; at most 6 MB are allowed: name fewer --studies")


def with_smaller_pictures(found: Index, quality: int) -> Index:
    """The index with its sample sheets in lossy WebP of a quality from 0 to 100, where that is smaller."""
    return found | {
        "studies": [
            study | {"sheets": {arm: _smaller(sheet, quality) for arm, sheet in study["sheets"].items()}}
            for study in found["studies"]
        ]
    }


def _smaller(picture: str, quality: int) -> str:
    return picture_url(lossy(base64.b64decode(picture.partition(",")[2]), quality))


def export(out: Path, studies: tuple[str, ...] = ()) -> int:
    """Write the page of the studies and runs in the current folder; returns its size in bytes.

    Args:
        out: the .html file.
        studies: names of the studies to show; empty: all.

    Raises:
        InputError: out is no .html file, a study is unknown, or the page would be larger than 6 MB.
        WriteError: the file cannot be written.
    """
    if not re.fullmatch(r"\.html?", out.suffix):
        raise InputError(f"out is {out}; the page is an .html file")
    check_output_file(out)
    found = index()
    names = [study["name"] for study in found["studies"]]
    if unknown := [name for name in studies if name not in names]:
        raise InputError(f"studies has {unknown[0]!r}; there are {', '.join(names) or 'none yet'}")
    if studies:
        found["studies"] = [study for study in found["studies"] if study["name"] in studies]
    text = page(found)
    write_atomically(out, text)
    return len(text.encode())
