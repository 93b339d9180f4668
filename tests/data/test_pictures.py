"""Pictures of every kind that people have: what counts as one, and what its pixels are."""

import io
import json
import os
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixnerd import InputError, data
from pixnerd.data import pictures
from pixnerd.data.pictures import find_pictures, in_threads, read_pixels, to_rgb, upright_size
from pixnerd.metrics.images import open_images

ROOT = Path(__file__).parents[2]
NOISE = np.random.default_rng(0).integers(0, 256, (24, 40, 4), dtype=np.uint8)


def write(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.fromarray(NOISE[..., :3])).save(path, **options)
    return path


def read(path):
    """[H, W, 3] as integers."""
    return read_pixels(path, path).permute(1, 2, 0).numpy().astype(int)


# --- pixels --------------------------------------------------------------------------------------------------------


def adm(image, size):
    """The crop as ADM's code has it."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    values = np.array(image)
    y, x = (values.shape[0] - size) // 2, (values.shape[1] - size) // 2
    return values[y : y + size, x : x + size]


@pytest.mark.parametrize("size", [(40, 24), (200, 131), (333, 1000), (31, 900), (16, 512)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_opaque_8_bit_pictures_are_cropped_as_in_adm_to_the_bit(tmp_path, size, mode):
    picture = Image.fromarray(NOISE[..., :3]).resize(size).convert(mode)
    path = write(tmp_path / "a.jpg", picture)
    with Image.open(path) as stored:
        expected = adm(stored.convert("RGB"), 16)
    assert np.array_equal(read_pixels(path, path, 16).permute(1, 2, 0), expected)


RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bits_are_divided_by_257(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", Image.fromarray(RAMP))
    assert (np.rint(RAMP / 257)[..., None] == read(path)).all()


def test_floats_are_read_from_0_to_1_and_unknown_ranges_are_refused(tmp_path):
    shares = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    path = write(tmp_path / "a.tiff", Image.fromarray(shares))
    assert (read(path) == np.arange(256).reshape(16, 16, 1)).all()
    for values in (shares * 300, shares - 0.5, np.full_like(shares, np.nan)):
        write(path, Image.fromarray(values))
        with pytest.raises(InputError, match=r"a.tiff has grey values .*; as F they have to lie in 0 … 1$"):
            read(path)
    write(path, Image.fromarray(RAMP.astype(np.int32) * 9))
    with pytest.raises(InputError, match=r"a.tiff has grey values from 0 to 589815; as I they .* 0 … 65535$"):
        read(path)


def transparent(mode):
    """A picture whose left half is transparent and hides noise; and what it shows."""
    pixels = NOISE.copy()
    pixels[..., 3] = 255
    pixels[:, :20, 3] = 0
    picture = Image.fromarray(pixels)
    if mode == "LA":
        picture = picture.convert("LA")
    elif mode == "PA":
        picture = picture.convert("RGB").quantize(32).convert("PA")
        picture.putalpha(Image.fromarray(pixels[..., 3]))
    expected = np.array(picture.convert("RGB")).astype(int)
    expected[:, :20] = 255
    return picture.convert(mode) if mode == "RGBa" else picture, expected


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_transparent_pixels_are_white_whatever_they_hide(mode):
    picture, expected = transparent(mode)
    assert picture.mode == mode
    assert np.array_equal(np.array(to_rgb(picture)), expected)


@pytest.mark.parametrize("file", ["a.png", "a.webp", "a.tiff"])
def test_transparency_is_the_same_in_every_format(tmp_path, file):
    picture, expected = transparent("RGBA")
    options = {"lossless": True, "exact": True} if file == "a.webp" else {}
    assert np.array_equal(read(write(tmp_path / file, picture, **options)), expected)


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 3] = 51  # a fifth
    assert np.abs(read(write(tmp_path / "a.png", Image.fromarray(pixels))) - 204).max() <= 1


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "I;16"])
def test_one_value_can_stand_for_transparent(tmp_path, mode):
    values = np.arange(64).reshape(8, 8)
    picture, hidden = Image.fromarray(values.astype(np.uint8)), 5
    if mode == "P":
        picture = picture.convert("P")
    elif mode == "RGB":
        picture, hidden = picture.convert("RGB"), (5, 5, 5)
    elif mode == "I;16":
        picture, hidden = Image.fromarray((values * 257).astype(np.uint16)), 5 * 257
    found = read(write(tmp_path / "a.png", picture, transparency=hidden))
    assert (found[values == 5] == 255).all()
    assert (found[values != 5] == values[values != 5][:, None]).all()


@pytest.mark.parametrize("file", ["a.gif", "a.png", "a.webp", "a.tiff"])
def test_of_several_frames_the_first_is_read(tmp_path, file):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if file == "a.webp" else {}
    path = write(tmp_path / file, frames[0], save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert (read(path) == [255, 0, 0]).all()


def test_size_and_pixels_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    for file in ("a.png", "a.jpg", "a.webp", "a.tiff"):
        path = write(tmp_path / file, exif=exif)
        assert upright_size(path) == (24, 40)
        assert read(path).shape == (40, 24, 3)
    assert np.array_equal(read(path), np.rot90(NOISE[..., :3], -1))
    path.write_text("I am a text")
    with pytest.raises(InputError, match=r"^/.*/a.tiff is not an image, despite its name$"):
        upright_size(path)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 50_000)])
def test_a_narrow_picture_is_cropped_in_ordinary_memory(tmp_path, size):
    """Of 1 × 20,000 pixels, enlarging before cropping to 256 takes 4 GB; the picture's middle is what counts."""
    long = max(size)
    values = np.abs(np.arange(long) - long / 2 + 0.5) * 20  # dark in the middle only
    values = np.broadcast_to(np.minimum(values, 255)[:, None], (long, min(size))).astype(np.uint8)
    path = write(tmp_path / "a.png", Image.fromarray(values if size[1] == long else values.T))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = read_pixels(path, path, 256).float().mean(0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
    along = found.mean(0 if size[0] == long else 1)
    assert along[128].item() < 40
    torch.testing.assert_close(along, along.flip(0), atol=10 / min(size) + 1, rtol=0)


def test_more_pixels_than_pillow_allows_are_refused_before_they_are_decoded(tmp_path):
    (tmp_path / "f" / "a").mkdir(parents=True)
    buffer = io.BytesIO()
    Image.new("1", (1, 1)).save(buffer, "PNG")
    header = bytearray(buffer.getvalue())
    header[16:24] = struct.pack(">II", 60_000, 60_000)
    header[29:33] = struct.pack(">I", zlib.crc32(header[12:29]))
    path = tmp_path / "f" / "a" / "bomb.png"
    path.write_bytes(header)
    with pytest.raises(InputError, match=r"bomb.png cannot be opened: it has more than 178,956,970 pixels"):
        data.load(f"folder:{tmp_path / 'f'}", 16)
    with pytest.raises(InputError, match=r"bomb.png cannot be read as an image: it has more than 178,956,970 pixels"):
        read_pixels(path, path, 16)


def test_what_would_start_another_program_is_no_picture(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    path = write(tmp_path / "a.eps")
    path = path.rename(tmp_path / "a.png")
    monkeypatch.setattr(subprocess, "check_call", None)
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(InputError, match=r"a.png cannot be read as an image: cannot identify"):
        read(path)


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name in ("b.PNG", "a.jfif", "deep/c.Tiff", "deep/d.gif", "deep.png/e.bmp", "f.jpeg", "g.webp", "h.tif"):
        kind = {"a.jfif": "JPEG"}.get(name)
        write(tmp_path / "f" / name, **({"format": kind} if kind else {}))
    for name in (".hidden.png", "._b.png", ".ipynb_checkpoints/b.png", "__MACOSX/b.png", "deep/.trash/c.png"):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "f" / "notes.txt").write_text("a png")
    (tmp_path / "f" / "empty.jpg").mkdir()
    return tmp_path / "f"


def test_which_files_are_pictures(folder):
    expected = ["a.jfif", "b.PNG", "deep/c.Tiff", "deep/d.gif", "deep.png/e.bmp", "f.jpeg", "g.webp", "h.tif"]
    assert find_pictures(folder) == expected
    assert find_pictures(folder, recursive=False) == [name for name in expected if "/" not in name]
    assert expected == [str(path.relative_to(folder)) for path in sorted(folder / name for name in expected)]
    assert open_images(folder).count == 8
    (folder / "f.jpeg").rename(folder.parent / "f.jpeg")
    (folder / "f.jpeg").symlink_to(folder.parent / "f.jpeg")
    assert find_pictures(folder) == expected
    (folder / "i.png").symlink_to(folder / "gone.png")
    with pytest.raises(InputError, match=r"f/i.png is a link to a file that does not exist"):
        find_pictures(folder)


def test_every_door_sees_the_same_files(folder, tmp_path):
    assert len(data.load(f"folder:{folder.parent}", 16)) == 8
    for path in map(folder.__truediv__, find_pictures(folder)):
        path.with_suffix(".txt").write_text("noise")
    captioned = data.load(f"captions:{folder}", 16)
    assert len(captioned) == 8
    assert {len(captions) for captions in captioned.captions} == {1}


def test_a_pipe_called_like_a_picture_is_not_read(tmp_path):
    write(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert find_pictures(tmp_path) == ["a.png"]


def test_a_folder_that_cannot_be_read_is_not_called_empty(folder, monkeypatch):
    scan = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(pictures.os, "scandir", refuse)
    for name in (f"folder:{folder.parent}", f"captions:{folder}"):
        with pytest.raises(InputError, match=r"^folder .*/f/deep cannot be read: Permission denied$"):
            data.load(name, 16)
    with pytest.raises(InputError, match=r"^folder .*/f/deep cannot be read: Permission denied$"):
        open_images(folder)


@pytest.mark.parametrize("names", [("CAT.JPG", "CAT.TXT"), ("CAT.JPG", "cat.txt"), ("cat.jpg", "Cat.Txt")])
def test_captions_are_found_in_upper_and_lower_case(tmp_path, names):
    write(tmp_path / "f" / names[0])
    (tmp_path / "f" / names[1]).write_text("a cat")
    assert list(data.load(f"captions:{tmp_path / 'f'}", 16).captions) == [("a cat",)]


def test_of_two_texts_the_one_of_the_same_spelling_is_read(tmp_path):
    for name, text in {"cat": "small", "CAT": "large"}.items():
        write(tmp_path / f"{name}.jpg")
        (tmp_path / f"{name}.txt").write_text(text)
    assert list(data.load(f"captions:{tmp_path}", 16).captions) == [("large",), ("small",)]


def test_threads_get_a_bounded_number_of_tasks(monkeypatch):
    monkeypatch.setattr(pictures, "AT_ONCE", 10)
    waiting, most = set(), 0

    class Items:
        def __len__(self):
            return 95

        def __getitem__(self, index):
            nonlocal most
            waiting.add(index)
            most = max(most, len(waiting))
            return index

    results = []
    for result in in_threads(lambda item: item * 2, Items(), "testing", "item"):
        waiting.discard(result // 2)
        results.append(result)
    assert results == [2 * index for index in range(95)]
    assert most <= 10


def test_a_large_photograph_gives_no_warning(tmp_path):
    """100 megapixels are above Pillow's first limit, which warns, and below its second."""
    Image.new("1", (10_000, 10_000)).save(tmp_path / "a.png")
    code = f"from pixnerd.data.pictures import *; check_header({str(tmp_path / 'a.png')!r}, '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_damaged_input_of_every_kind_is_read_or_refused_with_a_sentence():
    """A short run of the measurement, whose cases have a seed."""
    command = [sys.executable, "-m", "tests.measure.fuzz_data", "--cases", "80"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    counts = json.loads(done.stdout)
    assert sum(counts.values()) == 80
    assert len(counts) == 8  # each of four kinds is read, or refused
