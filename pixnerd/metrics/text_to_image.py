"""Text-to-image benchmarks: their prompts, images laid out as their scorers read them, and the scores they wrote.

GenEval (arXiv 2310.11513), DPG-Bench (2403.05135) and GenEval 2 (2512.16853) are scored by large detectors or question
answering models of their own; the layouts here are those that their scoring scripts expect. Everything for one
checkpoint and one file of prompts is in one folder: `source.json` records how the images were sampled, `images/` is
what the scorer reads. Dimension letters: n images of a prompt, H × W pixels.
"""

import hashlib
import json
import math
import re
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from ..data import to_uint8
from ..data.pictures import read_pixels
from ..differences import differences
from ..errors import InputError
from ..files import make_folder, replacing, write_atomically

Benchmark = Literal["geneval", "dpg", "geneval2"]
PROMPT_COUNTS: dict[Benchmark, int] = {"geneval": 553, "dpg": 1065, "geneval2": 800}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # GenEval's, as in its papers
PUBLISHED: dict[Benchmark, dict[str, float]] = {  # PixNerd-XXL/16 of arXiv 2507.23268
    "geneval": dict(zip(("overall", *TAGS), (0.73, 0.97, 0.86, 0.44, 0.83, 0.71, 0.53), strict=True)),
    "dpg": {"overall": 80.9},
    "geneval2": {},
}
BLANK = 1.0  # of 255 levels: a picture whose pixels deviate no more than this from their mean shows nothing
STRIDE = 1000  # image i of prompt p starts at noise STRIDE·p + i, regardless of the number of images per prompt


@dataclass(frozen=True)
class Prompt:
    """One line, or one file, of a benchmark."""

    name: str
    """name of its folder or picture: the index in the file, "00000" …, or DPG's id"""
    text: str
    about: dict[str, Any]
    """the complete JSON object of the line; empty for DPG"""


@dataclass(frozen=True)
class Prompts:
    """A benchmark's prompts, in its own order."""

    benchmark: Benchmark
    path: Path
    digest: str
    """first 12 digits of the file's sha256; for a folder, of the output of `LC_ALL=C sha256sum *.txt` in it"""
    entries: list[Prompt]

    @property
    def wording(self) -> str:
        """Whether GenEval's prompts are the original ones, which all begin alike; other benchmarks do not tell."""
        if self.benchmark != "geneval":
            return "as in the file"
        return "original" if all(entry.text.startswith("a photo of ") for entry in self.entries) else "not the original"

    @property
    def completeness(self) -> str:
        """How many of the benchmark's prompts there are."""
        return f"{len(self.entries):,} of {PROMPT_COUNTS[self.benchmark]:,}"


@dataclass(frozen=True)
class Picture:
    """An image file to sample."""

    path: str
    """relative to `images/`"""
    place: int
    """index of its prompt"""
    numbers: range
    """which of the prompt's images it contains: one, or the four of DPG's grid, row by row"""

    @property
    def noise(self) -> list[int]:
        """For each image the index that decides its noise; it depends only on the prompt and the image's number."""
        return [STRIDE * self.place + number for number in self.numbers]


@dataclass(frozen=True)
class Scores:
    """A scorer's results."""

    values: dict[str, float]
    """by name, starting with those that papers quote; GenEval's in 0 … 1, the others in 0 … 100"""
    images: int | None
    """number of images that were scored; None if the output does not say"""


# --- prompts -------------------------------------------------------------------------------------------------------


def read_prompts(benchmark: Benchmark, path: str | Path) -> Prompts:
    """The prompts of a benchmark.

    Args:
        benchmark: "geneval": its `evaluation_metadata.jsonl`, or one with rephrased prompts; "dpg": the folder with a
            text file for each id; "geneval2": its `geneval2_data.jsonl`.
        path: the file or folder.

    Raises:
        InputError: the path does not exist, or a line or file is not a prompt.
    """
    if benchmark not in get_args(Benchmark):
        raise InputError(f"benchmark {benchmark!r} is unknown; known ones: {', '.join(get_args(Benchmark))}")
    path = Path(path)
    if benchmark == "dpg":
        entries, digest = _read_folder(path)
    else:
        content = _content(path)
        keys = {"geneval": ("tag", "include", "prompt"), "geneval2": ("prompt",)}[benchmark]
        entries = [
            Prompt(f"{index:05}", _text(row["prompt"], f"{path}, line {index + 1}"), row)
            for index, row in enumerate(_rows(path, content, keys))
        ]
        digest = hashlib.sha256(content).hexdigest()
    if not entries:
        raise InputError(f"{path} holds no prompts")
    texts = [entry.text for entry in entries]
    if benchmark == "geneval2" and len(set(texts)) < len(texts):  # its scorer finds images by the prompt's words
        double = next(text for text in texts if texts.count(text) > 1)
        raise InputError(f"{path} has the prompt {double!r} more than once; GenEval 2 tells images apart by the prompt")
    return Prompts(benchmark, path, digest[:12], entries)


def _read_folder(path: Path) -> tuple[list[Prompt], str]:
    """DPG's prompts, sorted by id, and their digest."""
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; DPG's prompts are a folder with a text file for each id")
    files = sorted(file for file in path.glob("*.txt") if not file.name.startswith("."))
    entries, listing = [], hashlib.sha256()
    for file in files:
        if "." in file.stem:  # to the scorer, an id ends at the first dot
            raise InputError(f"{file} has a dot in its id; DPG's ids have none")
        content = _content(file)
        listing.update(f"{hashlib.sha256(content).hexdigest()}  {file.name}\n".encode())
        entries.append(Prompt(file.stem, _text(_decoded(file, content), str(file)), {}))
    return entries, listing.hexdigest()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text") from error


def _rows(path: Path, content: bytes, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, each with at least these keys."""
    lines = _decoded(path, content).rstrip().split("\n")
    rows = []
    for number, line in enumerate(lines if lines != [""] else [], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number} is not JSON: {line[:60]!r}") from error
        lacking = [key for key in keys if not isinstance(row, dict) or key not in row]
        if lacking:
            raise InputError(f"{path}, line {number} has no {' and no '.join(lacking)}: {line[:60]!r}")
        rows.append(row)
    return rows


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: the prompt is {value!r}; it has to be text")
    return value.strip()


# --- images --------------------------------------------------------------------------------------------------------


def pictures(prompts: Prompts, each: int) -> list[Picture]:
    """The files that the scorer expects, with `each` images for every prompt.

    Raises:
        InputError: `each` is not one for GenEval 2, four for DPG, or 1 … 999 for GenEval.
    """
    allowed = {"geneval": range(1, STRIDE), "dpg": range(4, 5), "geneval2": range(1, 2)}[prompts.benchmark]
    if each not in allowed:
        several = f"1 … {allowed[-1]}, 4 as published" if len(allowed) > 1 else f"{allowed[0]}"
        raise InputError(f"images_per_prompt is {each}; {prompts.benchmark} takes {several}")
    found = []
    for place, entry in enumerate(prompts.entries):
        if prompts.benchmark == "geneval":
            samples = f"{entry.name}/samples"
            found += [Picture(f"{samples}/{number:04}.png", place, range(number, number + 1)) for number in range(each)]
        else:
            found.append(Picture(f"{entry.name}.png", place, range(each)))
    return found


def begin(out: Path, prompts: Prompts, each: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Write everything except the pictures: `source.json`, GenEval's `metadata.jsonl`, GenEval 2's `paths.json`.

    Args:
        out: the folder; an interrupted one is resumed.
        prompts: see `read_prompts`.
        each: images per prompt.
        settings: everything else that determines the images: weights, sampling, seed.

    Returns:
        the contents of `source.json`.

    Raises:
        InputError: the folder holds other images.
    """
    wanted = pictures(prompts, each)
    source = {"benchmark": prompts.benchmark, "prompts": prompts.path.name, "sha256": prompts.digest}
    source |= {"wording": prompts.wording, "prompt_count": len(prompts.entries), "images_per_prompt": each}
    source = json.loads(json.dumps(source | settings))  # tuples become lists, as in the file
    path = out / "source.json"
    if path.is_file():
        before = _json(path) or {}
        if found := differences(before, source):
            differ = "; ".join(f"{d.name} {d.old} → {d.new}" for d in found)
            raise InputError(f"{out} already holds other images ({differ}): choose another folder")
    images = out / "images"
    for folder in dict.fromkeys((images / picture.path).parent for picture in wanted):
        make_folder(folder)
    if prompts.benchmark == "geneval":
        for entry in prompts.entries:
            write_atomically(images / entry.name / "metadata.jsonl", json.dumps(entry.about) + "\n")
    if prompts.benchmark == "geneval2":
        write_atomically(out / "paths.json", json.dumps(_paths(out, prompts), indent=1) + "\n")
    write_atomically(path, json.dumps(source, indent=2) + "\n")
    return source


def _paths(out: Path, prompts: Prompts) -> dict[str, str]:
    """GenEval 2's map: prompt → absolute path of its picture."""
    return {entry.about["prompt"]: str((out / "images" / f"{entry.name}.png").resolve()) for entry in prompts.entries}


def draw(
    out: Path, wanted: Sequence[Picture], sample: Callable[[list[int], list[int]], Tensor], batch_size: int
) -> Iterator[int]:
    """Sample the pictures that do not exist yet, batch by batch; yields how many are done.

    The batches are the same after every interruption, so the samples are the same to the last bit; a picture gets its
    final name only when it is complete.

    Args:
        out: the folder.
        wanted: see `pictures`.
        sample: indices of B prompts, and B indices of noise → images [B, C, H, W] in [−1, 1].
        batch_size: maximum number of images sampled together; the images of a grid stay together.

    Raises:
        InputError: at the call: a batch size below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it has to be at least 1")
    together = max(1, batch_size // len(wanted[0].numbers))
    return _draw(out / "images", [wanted[i : i + together] for i in range(0, len(wanted), together)], sample)


def _draw(
    images: Path, batches: Sequence[Sequence[Picture]], sample: Callable[[list[int], list[int]], Tensor]
) -> Iterator[int]:
    done = 0
    for batch in batches:
        missing = {picture for picture in batch if not (images / picture.path).is_file()}
        if missing:
            sampled = sample(
                [picture.place for picture in batch for _ in picture.numbers],
                [index for picture in batch for index in picture.noise],
            )
            pixels = to_uint8(sampled).expand(-1, 3, -1, -1).cpu()
            for picture, own in zip(batch, pixels.split(len(batch[0].numbers)), strict=True):
                if picture in missing:
                    _write(images / picture.path, own)
        done += len(batch)
        yield done


def _write(path: Path, images: Tensor) -> None:
    """Write images uint8 [n, 3, H, W] as a PNG: a single image, or four in a square."""
    grid = make_grid(images, nrow=math.isqrt(len(images)), padding=0)  # [3, rows·H, columns·W]
    with replacing(path) as partial:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(partial, "PNG")


def load_picture(out: Path, picture: Picture) -> Tensor:
    """The images of a picture, uint8 [n, 3, H, W].

    Raises:
        InputError: it is missing or damaged, or a grid whose sides do not divide evenly.
    """
    path = out / "images" / picture.path
    if not path.is_file():
        raise InputError(f"{picture.path} is missing")
    pixels = read_pixels(path, picture.path)  # [3, rows·H, columns·W]
    side = math.isqrt(len(picture.numbers))
    height, width = pixels.shape[1:]
    if height % side or width % side:
        raise InputError(f"{picture.path} has {height} × {width} pixels, not a grid of {len(picture.numbers)} images")
    tiles = pixels.reshape(3, side, height // side, side, width // side)  # [3, rows, H, columns, W]
    return tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)


def check_images(out: Path, prompts: Prompts, each: int, size: tuple[int, int]) -> None:
    """Make sure that the scorer will read the right pictures: all of them, of this size, none blank, no extra ones.

    Args: see `begin`; size: (H, W) of an image.

    Raises:
        InputError: the first three faults, and how many more there are.
    """
    images, wanted = out / "images", pictures(prompts, each)
    faults = []
    for picture in wanted:
        try:
            found = load_picture(out, picture)
        except InputError as error:
            faults.append(str(error))
            continue
        if tuple(found.shape[2:]) != tuple(size):
            pixels = " × ".join(map(str, found.shape[2:]))
            faults.append(f"{picture.path} has images of {pixels} pixels, not {size[0]} × {size[1]}")
        contrast = found.double().flatten(2).std(2, correction=0).amax(1)  # [n], of the channel with most
        blank = (contrast <= BLANK).nonzero().flatten().tolist()
        faults += [f"{picture.path} is blank" + f" (image {i})" * (len(contrast) > 1) for i in blank]
    expected = {picture.path for picture in wanted}
    if prompts.benchmark == "geneval":
        about = {f"{entry.name}/metadata.jsonl": entry.about for entry in prompts.entries}
        faults += [f"{name} is not the prompt's line" for name in about if _json(images / name) != about[name]]
        expected |= about.keys()
    if prompts.benchmark == "geneval2" and _json(out / "paths.json") != _paths(out, prompts):
        faults.append("paths.json does not name these pictures")
    there = {path.relative_to(images).as_posix() for path in images.rglob("[!.]*") if path.is_file()}
    faults += [f"{name} was not asked for" for name in sorted(there - expected)]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputError(f"{images} is not ready to be scored: {', '.join(faults[:3])}{more}")


def _json(path: Path) -> Any:
    """The contents of a JSON file; None if it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


# --- scores --------------------------------------------------------------------------------------------------------


def scoring_commands(out: Path, prompts: Prompts, side: int) -> list[str]:
    """Commands to run in a clone of the benchmark's own code; they write to `out`. `side`: pixels of an image."""
    images, results = out.resolve() / "images", results_path(out, prompts.benchmark).resolve()
    if prompts.benchmark == "geneval":
        return [
            shlex.join(["python", "evaluation/evaluate_images.py", str(images), "--outfile", str(results)])
            + " --model-path DETECTOR",
            # it reads a list of objects from the current folder
            f"(cd evaluation && {shlex.join(['python', 'summary_scores.py', str(results)])})",
        ]
    if prompts.benchmark == "dpg":
        score = ["accelerate", "launch", "dpg_bench/compute_dpg_bench.py", "--image-root-path", str(images)]
        return [shlex.join([*score, "--resolution", str(side), "--pic-num", "4", "--res-path", str(results)])]
    data = ["--benchmark_data", str(prompts.path.resolve())]
    score = ["python", "evaluation.py", *data, "--image_filepath_data", str(out.resolve() / "paths.json")]
    return [
        shlex.join([*score, "--method", "soft_tifa_gm", "--output_file", str(results)]),
        shlex.join(["python", "soft_tifa_analysis.py", *data, "--score_data", str(results)]),
    ]


def results_path(out: Path, benchmark: Benchmark) -> Path:
    """The file to which the scorer writes, see `scoring_commands`."""
    return out / {"geneval": "results.jsonl", "dpg": "results.txt", "geneval2": "score_lists.json"}[benchmark]


def read_results(path: str | Path, prompts: Prompts, each: int) -> Scores:
    """The scores in a scorer's output for the images of these prompts, `each` per prompt.

    - geneval: the lines of `evaluate_images.py`; a tag's score is the share of its images that are correct, the overall
      score the mean over the tags.
    - dpg: the text of `compute_dpg_bench.py`; its last overall score, and those of its five broad categories.
    - geneval2: the lists of `evaluation.py`, the probability of each right answer; their geometric (GM) and arithmetic
      (AM) mean over a prompt's questions, averaged over prompts, and the mean over all questions of a skill.

    Raises:
        InputError: the file is missing, has another format, or is about other images.
    """
    read = {"geneval": _geneval_scores, "dpg": _dpg_scores, "geneval2": _geneval2_scores}[prompts.benchmark]
    return read(Path(path), _content(Path(path)), prompts, each)


def _geneval_scores(path: Path, content: bytes, prompts: Prompts, each: int) -> Scores:
    wanted = {picture.path: prompts.entries[picture.place] for picture in pictures(prompts, each)}
    correct: dict[str, bool] = {}
    for row in _rows(path, content, ("filename", "tag", "prompt", "correct")):
        name = "/".join(Path(str(row["filename"])).parts[-3:])
        if name not in wanted or row["prompt"] != wanted[name].about["prompt"]:
            raise InputError(f"{path} is about other images: {name} with the prompt {row['prompt']!r}")
        if name in correct or not isinstance(row["correct"], bool):
            raise InputError(f"{path} has {name} twice, or without a plain true or false")
        correct[name] = row["correct"]
    lacking = [name for name in wanted if name not in correct]
    if lacking:
        raise InputError(f"{path} lacks {len(lacking)} of {len(wanted)} images, the first: {lacking[0]}")
    by_tag: dict[str, list[bool]] = {}
    for name, entry in wanted.items():
        by_tag.setdefault(entry.about["tag"], []).append(correct[name])
    tags = {tag: fmean(by_tag[tag]) for tag in (*TAGS, *by_tag) if tag in by_tag}
    return Scores({"overall": fmean(tags.values()), **tags}, len(correct))


def _dpg_scores(path: Path, content: bytes, prompts: Prompts, each: int) -> Scores:
    text = _decoded(path, content)
    number = r"([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
    totals = re.findall(rf"DPG-Bench score\W*{number}", text, re.IGNORECASE)
    if not totals:
        raise InputError(f"{path} has no line 'DPG-Bench score: NUMBER', with which compute_dpg_bench.py ends")
    broad = re.findall(r"L1 category scores:(.*?)L2 category scores:", text, re.IGNORECASE | re.DOTALL)
    categories = re.findall(rf"^\s*(\w+):\s*{number}", broad[-1], re.MULTILINE) if broad else []
    scored = {Path(name).stem for name in re.findall(r"^(.+?\.png),", text, re.MULTILINE)}
    if scored:  # a printed summary alone has no lines of pictures
        lacking = [entry.name for entry in prompts.entries if entry.name not in scored]
        strange = sorted(scored - {entry.name for entry in prompts.entries})
        if strange:
            raise InputError(f"{path} is about other images: {strange[0]}.png belongs to none of these prompts")
        if lacking:
            of = f"{len(lacking)} of {len(prompts.entries)} pictures"
            warnings.warn(f"{path} leaves out {of}, the first: {lacking[0]}.png; its score does too", stacklevel=3)
    values = {"overall": float(totals[-1]), **{name: float(value) for name, value in categories}}
    return Scores(values, each * len(scored) or None)


def _geneval2_scores(path: Path, content: bytes, prompts: Prompts, each: int) -> Scores:
    try:
        lists = json.loads(content)
    except ValueError as error:
        raise InputError(f"{path} is not JSON; evaluation.py writes a list of lists of numbers") from error
    if not isinstance(lists, list) or len(lists) != len(prompts.entries):
        count = len(lists) if isinstance(lists, list) else "no"
        raise InputError(f"{path} has {count} lists of scores; there are {len(prompts.entries)} prompts")
    skills: dict[str, list[float]] = {}
    for scores, entry in zip(lists, prompts.entries, strict=True):
        asked = entry.about.get("skills", scores)  # prompts without skills still have a mean
        plain = isinstance(scores, list) and all(isinstance(x, (int, float)) and 0 <= x < math.inf for x in scores)
        if not plain or not scores or len(scores) != len(asked):
            raise InputError(f"{path}: the scores of {entry.text!r} are {scores}; it needs one number ≥ 0 per question")
        for skill, score in zip(asked if "skills" in entry.about else (), scores, strict=False):
            skills.setdefault(skill, []).append(score)
    arithmetic = fmean(fmean(scores) for scores in lists)
    geometric = fmean(math.prod(scores) ** (1 / len(scores)) for scores in lists)
    by_skill = {name: 100 * fmean(scores) for name, scores in skills.items()}
    means = {"Soft-TIFA GM": 100 * geometric, "Soft-TIFA AM": 100 * arithmetic}
    return Scores(means | by_skill, each * len(lists))
