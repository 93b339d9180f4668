"""What the fuzz scripts share: damaging bytes and JSON with a seed, judging an outcome, and running the cases."""

import argparse
import collections
import copy
import faulthandler
import json
import os
import pickle
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pixnerd import InputError

HANG = 60  # seconds
WORDS = (
    b"\0",
    b"\xff" * 4,
    b"\n",
    b"\r",
    b"\xef\xbb\xbf",
    b"\xe9",
    b"{",
    b"-1",
    b"1e999",
    b"../",
    b"cos\nsystem\n(",
    b"",
)
VALUES = (None, -1, 0, 1, 2**40, 10**400, 1.5, float("nan"), "", "x", "../x", [], [-1], {}, {"x": 1}, True)

Use = Callable[[], None]  # reads the damaged input through the real doors
Case = Callable[[Path, random.Random], Use]  # writes an input into an empty folder and damages it


def mutated(content: bytes, draw: random.Random, near: float = 0.6) -> bytes:
    """Up to four changes: bytes flipped, cut, doubled, removed or replaced; `near` of them near the beginning."""
    changed = bytearray(content)
    for _ in range(draw.choice((0, 1, 1, 2, 4))):
        if not changed:
            break
        place = (
            min(int(draw.expovariate(1 / 60)), len(changed) - 1)
            if draw.random() < near
            else draw.randrange(len(changed))
        )
        match draw.randrange(8):
            case 0:
                changed[place] ^= 1 << draw.randrange(8)
            case 1:
                changed[place] = draw.randrange(256)
            case 2:
                del changed[place:]
            case 3:
                del changed[place : place + draw.randint(1, 64)]
            case 4:
                changed[place:place] = changed[place : place + draw.randint(1, 64)]
            case 5:
                changed[place : place + 4] = draw.choice((0, 1, 2**31, 2**32 - 1, 65_536)).to_bytes(
                    4, draw.choice(("big", "little"))
                )
            case 6:
                changed[place : place + 1] = draw.choice(WORDS)
            case 7:
                changed[place : place + 2] = reversed(changed[place : place + 2])
    return bytes(changed)


def replace_one(tree: dict | list, draw: random.Random) -> None:
    """Replace, remove or, in a list, double one value somewhere in a JSON tree."""
    key = draw.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
    if isinstance(tree[key], (dict, list)) and tree[key] and draw.random() < 0.6:
        replace_one(tree[key], draw)
    elif draw.random() < 0.2:
        del tree[key]
    elif isinstance(tree, list) and draw.random() < 0.3:
        tree.insert(key, tree[key])
    else:
        tree[key] = copy.deepcopy(draw.choice(VALUES))


def mutated_json(content: str, draw: random.Random) -> str:
    """A JSON object with a value replaced, removed or, under its key, given twice."""
    tree = json.loads(content)
    if draw.random() < 0.2:
        return content.replace("{", '{"' + draw.choice(list(tree)) + f'": {json.dumps(draw.choice(VALUES))}, ', 1)
    for _ in range(draw.choice((1, 1, 2))):
        if tree:
            replace_one(tree, draw)
    return json.dumps(tree)


def files_of(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def keeping(folder: Path, use: Use, changes: Callable[[Path], bool] = lambda path: False) -> Use:
    """The same use, which fails if a file of the input has changed or gone, but for those that may change."""
    before = {path: content for path, content in files_of(folder).items() if not changes(path)}

    def watched() -> None:
        try:
            use()
        finally:
            after = files_of(folder)
            gone = [str(path) for path, content in before.items() if after.get(path) != content]
            assert not gone, f"changed or gone: {gone}"

    return watched


def outcome(use: Use) -> str:
    """ "read", "refused", or what must not happen."""
    try:
        use()
    except InputError as error:
        return "refused" if str(error).strip() and "\n" not in str(error) else f"not one sentence: {error}"
    except BaseException:
        return traceback.format_exc()
    return "read"


def unpickled(*_: Any, **__: Any) -> None:
    raise AssertionError("something was unpickled")


def run_cases(kinds: Mapping[str, Case], default: int) -> None:
    """Run --cases of these kinds in turn, count what came of them, and exit with code 1 if anything must not happen."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=default)
    parser.add_argument("--first", type=int, default=0, help="number of the first case: one case again, or in pieces")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of damaged metadata, of damaged checkpoints
    pickle.load = pickle.loads = pickle.Unpickler = unpickled
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    faults = 0
    for number in range(options.first, options.first + options.cases):
        kind, draw = list(kinds)[number % len(kinds)], random.Random(number)
        root = Path(tempfile.mkdtemp())
        os.environ["PIXNERD_DATA"] = str(root / "cache")
        (root / "input").mkdir()
        use = kinds[kind](root / "input", draw)
        faulthandler.dump_traceback_later(HANG, exit=True)  # a hang may be inside C
        found = outcome(use)
        faulthandler.cancel_dump_traceback_later()
        if found not in ("read", "refused"):
            faults += 1
            print(f"case {number}, {kind}: {found}", flush=True)
            found = "FAULT"
        counts[kind, found] += 1
        shutil.rmtree(root)
    print(json.dumps({f"{kind} {found}": count for (kind, found), count in sorted(counts.items())}, indent=2))
    totals = {name: sum(n for (_, found), n in counts.items() if found == name) for name in ("read", "refused")}
    print(
        f"{options.cases} cases: {totals['read']} read, {totals['refused']} refused, {faults} faults", file=sys.stderr
    )
    sys.exit(bool(faults))
