"""Training on ordinary photographs: mixed sizes, grey, CMYK, rotated by EXIF, and one truncated file."""

import dataclasses

import pytest
import torch
from PIL import Image

from pixnerd import InputError, data
from pixnerd.checkpoints import newest_checkpoint
from pixnerd.data.folder import ImageFolder
from pixnerd.training import train

from .test_training import CPU, MODEL, config_for, final_files

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]  # of the quadrants, row by row
GREYS = [(76,) * 3, (150,) * 3, (29,) * 3, (255,) * 3]  # their luminance, ITU-R 601
SIZES = [(64, 48), (48, 64), (40, 40), (203, 121)]  # width and height, upright
LARGER = dataclasses.replace(MODEL, image_size=32)
ORIENTATION = 0x0112  # the EXIF tag; 6: rotate clockwise to see the picture upright


def quadrants(width, height):
    image = Image.new("RGB", (width, height))
    for i, colour in enumerate(COLOURS):
        left, top = (i % 2) * (width // 2), (i // 2) * (height // 2)
        image.paste(colour, (left, top, left + width, top + height))
    return image


def save(image, path, kind):
    options = {"quality": 95}
    if kind == "turned":
        image = image.transpose(Image.Transpose.ROTATE_90)  # counter-clockwise, which the tag undoes
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = 6
    mode = {"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB")
    image.convert(mode).save(path, **options)
    with Image.open(path) as written:
        assert written.mode == mode


@pytest.fixture
def photographs(tmp_path):
    """16 pictures of the same four quadrants, named by kind and size."""
    for kind in ("cmyk", "colour", "grey", "turned"):
        (tmp_path / "photographs" / kind).mkdir(parents=True)
        for width, height in SIZES:
            save(quadrants(width, height), tmp_path / "photographs" / kind / f"{width}x{height}.jpg", kind)
    return tmp_path / "photographs"


def test_colours_and_directions_are_those_of_the_upright_picture(photographs):
    dataset = data.load(f"folder:{photographs}", 32)
    assert len(dataset) == 16
    for index, label in enumerate(dataset.labels):
        expected = GREYS if dataset.classes[label] == "grey" else COLOURS
        middles = dataset.pixels(index)[:, 8::16, 8::16].flatten(1).T.int()  # [4 quadrants, 3]
        assert (middles - torch.tensor(expected)).abs().max() <= 12, dataset.paths[index]


def test_training_stops_at_a_truncated_file_and_resumes_once_it_is_complete(photographs, tmp_path, monkeypatch):
    order, read = [], ImageFolder.pixels
    monkeypatch.setattr(ImageFolder, "pixels", lambda self, index: order.append(index) or read(self, index))
    options = {"data": f"folder:{photographs}", "model": LARGER, "batch_size": 4, "steps": 8, "checkpoint_every": 2}
    straight = config_for(tmp_path / "straight", **options)
    list(train(straight, CPU))
    assert sorted(order[:16]) == list(range(16))  # the first four steps see every picture

    cut_off = data.load(straight.data, 32).paths[order[13]]  # used in the fourth step
    whole = cut_off.read_bytes()
    cut_off.write_bytes(whole[: len(whole) * 2 // 3])
    config = config_for(tmp_path / "run", **options)
    records = train(config, CPU)
    assert [next(records).step for _ in range(3)] == [1, 2, 3]
    with pytest.raises(InputError, match=rf"{cut_off} cannot be read as an image: "):
        next(records)
    assert newest_checkpoint(tmp_path / "run" / "checkpoints").name == "step-3"

    cut_off.write_bytes(whole)
    assert [record.step for record in train(config, CPU)] == [4, 5, 6, 7, 8]
    assert final_files(tmp_path / "run") == final_files(tmp_path / "straight")
