"""With 1,000 folders made here, containing links to a few small images."""

import hashlib
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pixnerd import InputError, data
from pixnerd.cli import main
from pixnerd.data import synsets
from pixnerd.data.pictures import read_pixels


@pytest.fixture
def pictures(tmp_path):
    """The kinds of files in ImageNet: JPEGs of all shapes, also grey, CMYK and rotated, and a PNG named JPEG."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, mode, size, kind, exif in [
        ("wide", "RGB", (50, 30), "jpeg", None),
        ("tall", "RGB", (20, 70), "jpeg", None),
        ("grey", "L", (33, 33), "jpeg", None),
        ("print", "CMYK", (30, 40), "jpeg", None),
        ("turned", "RGB", (40, 24), "jpeg", turned),
        ("png", "RGBA", (40, 24), "png", None),
    ]:
        noise = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size).convert(mode)
        noise.save(folder / f"{name}.JPEG", kind, **({"exif": exif} if exif else {}))
    return sorted(folder.iterdir())


@pytest.fixture
def root(tmp_path, pictures):
    """PATH with train/: one image in each class, two in the last."""
    root = tmp_path / "ILSVRC"
    for label, name in enumerate(synsets.synsets()):
        (root / "train" / name).mkdir(parents=True)
        os.link(pictures[label % len(pictures)], root / "train" / name / f"{name}_{label}.JPEG")
    os.link(pictures[0], root / "train" / name / "a first one.jpg")
    (root / "train" / name / "notes.txt").write_text("not an image, and not named like one")
    (root / "train" / ".cache").mkdir()
    return root


def test_the_list_is_the_standard_one():
    ids = synsets.synsets()
    assert ids == sorted(set(ids))
    assert len(ids) == 1000
    # tench, golden retriever, loggerhead, toilet tissue
    assert [ids.index(name) for name in ("n01440764", "n02099601", "n01664065", "n15075141")] == [0, 207, 33, 999]
    assert hashlib.sha256("\n".join(ids).encode()).hexdigest() == synsets.SHA256


def test_every_id_has_a_word_of_its_own():
    ids = synsets.synsets()
    words = synsets.words_of(ids)
    assert [words[label] for label in (0, 2, 207, 999)] == [
        "tench",
        "great white shark",
        "golden retriever",
        "toilet tissue",
    ]
    assert len(set(words)) == 1000
    assert not set(words) & set(ids)
    assert synsets.words_of(["cats", ids[207], "n00000000"]) == ["cats", "golden retriever", "n00000000"]


def test_a_changed_list_is_refused(tmp_path, monkeypatch):
    changed = tmp_path / "list.txt"
    changed.write_text("\n".join(reversed(synsets.synsets())))
    monkeypatch.setattr(synsets, "LIST", changed)
    with pytest.raises(InputError, match="sha256 differs.*reinstall"):
        synsets.synsets()


def test_images_and_labels_are_those_of_the_folders(root, pictures):
    for number in (7, 0, 12, 3, 9, 5, 11, 1, 8, 2, 10, 4, 6):
        os.link(pictures[number % len(pictures)], root / "train" / "n01440764" / f"more_{number:02}.JPEG")
    images, folder = data.load(f"imagenet:{root}", 16), data.load(f"folder:{root / 'train'}", 16)
    assert (len(images), images.num_classes, images.channels) == (1014, 1000, 3)
    assert images.classes == synsets.synsets()
    assert images.labels.equal(folder.labels)
    for index in [*range(25), 1012, 1013, -1]:
        assert images.pixels(index).equal(folder.pixels(index)), index
    assert data.load(f"imagenet:{root / 'train'}", 16).batch([13, 14, 1013])[1].tolist() == [0, 1, 999]


def test_both_are_read_the_same_in_worker_processes(root):
    images = data.load(f"imagenet:{root}", 16)
    order = [999, 0, 4, 7]
    together = torch.cat([pixels for pixels, _ in DataLoader(images, 2, sampler=order, num_workers=2)])
    assert together.equal(torch.stack([images[index][0] for index in order]))
    assert pickle.loads(pickle.dumps(images)).pixels(5).equal(images.pixels(5))


def test_names_of_any_kind(root, pictures):
    folder = root / "train" / "n01440764"
    names = [b"\xc3\xa9t\xc3\xa9.JPEG", b"latin \xe9t\xe9.JPEG"]
    try:
        for name in names:
            os.link(pictures[0], os.path.join(os.fsencode(folder), name))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    images = data.load(f"imagenet:{root}", 16)
    assert images.labels[:4].tolist() == [0, 0, 0, 1]
    assert images.pixels(0).equal(images.pixels(1))  # all three are the same picture
    assert images.pixels(2).equal(images.pixels(1))


def test_a_bad_file_is_named_when_it_is_read(root):
    bad = root / "train" / "n01443537" / "n01443537_1.JPEG"
    bad.unlink()
    bad.write_text("I am a text")
    images = data.load(f"imagenet:{root}", 16)
    images.pixels(0)
    with pytest.raises(InputError, match=r"n01443537_1\.JPEG cannot be read as an image"):
        images.pixels(1)


def test_a_damaged_exif_block_is_named_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    path = tmp_path / "photo.JPEG"
    Image.new("RGB", (20, 12)).save(path, exif=exif)
    content = bytearray(path.read_bytes())
    content[content.index(b"Exif") + 17] = 0  # breaks the count of the camera's tag: Pillow raises struct.error
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"photo\.JPEG cannot be read as an image"):
        read_pixels(path, path, 8)


def test_missing_and_surplus_folders_are_named(root):
    ids = synsets.synsets()
    (root / "train" / "n99999999").mkdir()
    with pytest.raises(InputError, match=r"train does not hold the 1,000 .*: 1 surplus \(n99999999\)$"):
        data.load(f"imagenet:{root}", 16)
    for name in ids[10:14]:
        (root / "train" / name).rename(root / name)
    with pytest.raises(
        InputError, match=rf"4 missing \({ids[10]}, {ids[11]}, {ids[12]}, …\) and 1 surplus \(n99999999\)$"
    ):
        data.load(f"imagenet:{root}", 16)
    (root / "train" / "n99999999").rename(root / "train" / ids[10])
    for name in ids[11:14]:
        (root / name).rename(root / "train" / name)
    with pytest.raises(InputError, match=rf"{ids[10]} holds no images"):
        data.load(f"imagenet:{root}", 16)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(InputError, match=r"gone does not exist; 'imagenet:PATH' needs"):
        data.load(f"imagenet:{tmp_path / 'gone'}", 16)
    with pytest.raises(InputError, match=r"1000 missing \(n01440764, n01443537, n01484850, …\)$"):
        data.load(f"imagenet:{tmp_path}", 16)
    with pytest.raises(InputError, match=r"known: .*imagenet:PATH"):
        data.load("imagenet:", 16)


def test_a_model_trains_on_it(root, tmp_path):
    tiny = ["--size", "nano/8", "--model.image-size", "16", "--batch-size", "4", "--steps", "1", "--compile", "off"]
    main(["train", "--data", f"imagenet:{root}", "--out", str(tmp_path / "run"), *tiny])
    assert (tmp_path / "run" / "checkpoints" / "step-1" / "model.safetensors").is_file()
