"""The small picture of a run's samples."""

import io

import numpy as np
import pytest
from PIL import Image

from pixnerd import InputError
from pixnerd.studies import sheet
from pixnerd.studies.sheet import SHEET, save_sheet, sheet_of_samples


def flat(count, height, width):
    """Images of one colour each, another one for every image."""
    colours = np.stack([np.arange(count) + 1, 255 - np.arange(count), np.arange(count) * 2], 1).astype(np.uint8)
    return np.broadcast_to(colours[:, None, None], (count, height, width, 3)).copy()


def tiles(content):
    """The 16 tiles of a sheet, [16, S, S, 3], after a look at the lines between them."""
    pixels = np.asarray(Image.open(content))
    side = (len(pixels) - 1) // 4 - 1
    assert pixels.shape == (4 * (side + 1) + 1, 4 * (side + 1) + 1, 3)
    assert (pixels[:: side + 1] == 128).all()
    assert (pixels[:, :: side + 1] == 128).all()
    rows = [pixels[1 + r * (side + 1) :][:side] for r in range(4)]
    return np.stack([row[:, 1 + c * (side + 1) :][:, :side] for row in rows for c in range(4)])


def write(tmp_path, images):
    np.savez_compressed(tmp_path / "samples.npz", arr_0=images, labels=np.arange(len(images)))
    return tmp_path / "samples.npz"


def test_sixteen_images_become_a_grid_without_loss():
    images = np.random.default_rng(0).integers(0, 256, (SHEET, 5, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    save_sheet(images, file)
    assert (tiles(file) == images).all()


@pytest.mark.parametrize("count", [16, 17, 100])
def test_sixteen_samples_are_spread_over_the_file(tmp_path, count):
    images = flat(count, 8, 8)
    found = tiles(io.BytesIO(sheet_of_samples(write(tmp_path, images))))
    assert (found == images[[place * count // 16 for place in range(16)]]).all()


def test_places_without_a_sample_are_grey(tmp_path):
    images = flat(3, 8, 8)
    found = tiles(io.BytesIO(sheet_of_samples(write(tmp_path, images))))
    assert (found[:3] == images).all()
    assert (found[3:] == 128).all()


@pytest.mark.parametrize(("height", "width", "side"), [(64, 64, 64), (256, 256, 64), (200, 130, 65), (96, 400, 48)])
def test_large_samples_are_reduced_and_their_middle_is_shown(tmp_path, height, width, side):
    images = flat(16, height, width)
    short, shift = min(height, width), abs(height - width) // 2
    long = images if height > width else images.swapaxes(1, 2)
    long[:, :shift] = long[:, shift + short :] = 0  # what lies beyond the middle
    found = tiles(io.BytesIO(sheet_of_samples(write(tmp_path, images))))
    assert (found == flat(16, side, side)).all()


def test_what_holds_no_samples_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "samples.npz"
    for content in (b"", b"text", write(tmp_path, flat(4, 8, 8)).read_bytes()[:-30]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="samples.npz (holds no samples|is not a readable)"):
            sheet_of_samples(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(InputError, match="samples.npz holds no samples$"):
        sheet_of_samples(path)
    for wrong in (np.zeros((4, 8, 8, 3)), np.zeros((4, 8, 8), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)):
        with pytest.raises(InputError, match=r"samples.npz holds no samples: they are arr_0, uint8 \[N, H, W, 3\]"):
            sheet_of_samples(write(tmp_path, wrong))
    with pytest.raises(InputError, match="does not exist"):
        sheet_of_samples(tmp_path / "none.npz")
    monkeypatch.setattr(sheet, "LARGEST", 1000)
    with pytest.raises(InputError, match="has 0 MB of samples; a sheet is made of at most 0 MB"):
        sheet_of_samples(write(tmp_path, flat(16, 8, 8)))
