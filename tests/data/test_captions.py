import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pixnerd import InputError, data, load
from pixnerd.cli import main
from pixnerd.data import captions
from pixnerd.text import TextModelConfig
from pixnerd.training import TrainConfig, train

CAPTIONS = [("a red cat",), ("a blue dog", "a dog\u2019s portrait"), ("a cat",), ("red",), ("a blue cat", "blue")]
TEXTS = ["a red cat", "\n a blue dog \r\n\na dog\u2019s portrait\n", "\ufeffa cat\n", "red", "a blue cat\nblue\n"]


def picture(index, suffix=".png"):
    """Bytes of a picture that is not square, stored rotated, with the EXIF tag for it."""
    width, height = 20 + 3 * index, 44
    noise = np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height))
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, Image.registered_extensions()[suffix], exif=exif)
    return stream.getvalue()


def files_of(indices=range(5)):
    """Name → bytes: images of several kinds, at several depths, each with its .txt."""
    files = {}
    for index, suffix in zip(indices, [".png", ".jpg", ".webp", ".JPEG", ".png"], strict=False):
        stem = f"{'deep/er/' if index > 2 else ''}{index:03}"
        files[stem + suffix] = picture(index, suffix.lower())
        files[stem + ".txt"] = TEXTS[index].encode()
    return files


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_shard(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path.parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXNERD_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


@pytest.fixture
def folder(tmp_path):
    return write_files(tmp_path / "folder", files_of())


@pytest.fixture
def shards(tmp_path):
    """The folder's files in three shards, two with samples, and between them files that webdataset ignores."""
    files = list(files_of().items())
    noise = {"__meta__": b"", "LICENSE": b"free", "._000.png": b"finder", "000.json": b"{}", "000.mask.png": b"-"}
    write_shard(tmp_path / "shards" / "a.tar", dict([*noise.items(), *files[:4]]))
    write_shard(tmp_path / "shards" / "b.tar", {})
    return write_shard(tmp_path / "shards" / "c.tar", dict(files[4:]))


def opened(monkeypatch):
    """The names of the shards that tarfile opens from here on."""
    names = []
    original = tarfile.open
    monkeypatch.setattr(captions.tarfile, "open", lambda path, *rest: names.append(path.name) or original(path, *rest))
    return names


def test_folder_and_shards_give_the_same(folder, shards):
    loose, packed = data.load(f"captions:{folder}", 16), data.load(f"shards:{shards}", 16)
    for images in (loose, packed):
        assert (len(images), images.channels, images.classes) == (5, 3, ["image"])
        assert images.labels.tolist() == [0] * 5
        assert images.captions
        assert list(images.captions) == CAPTIONS
        assert images.captions[-1] == CAPTIONS[-1]
        with pytest.raises(IndexError):
            images.captions[5]
    for index in [4, 0, 3, 1, 2, -1]:
        assert packed.pixels(index).equal(loose.pixels(index))
    pixels, labels = packed.batch([3, 1])
    assert (pixels.dtype, labels.tolist()) == (torch.uint8, [0, 0])
    assert pixels[1].equal(packed.pixels(1))


def test_images_are_upright_cropped_and_in_their_place(folder):
    images = data.load(f"captions:{folder}", 20)
    for index in (0, 2):
        stored = Image.open(next(folder.glob(f"{index:03}.[!t]*"))).convert("RGB")
        upright = stored.transpose(Image.Transpose.ROTATE_270)
        square = data.pictures.center_crop(upright, 20)
        assert images.pixels(index).permute(1, 2, 0).numpy().tolist() == np.asarray(square).tolist()


def test_both_read_the_same_in_worker_processes(folder, shards):
    for name in (f"captions:{folder}", f"shards:{shards}"):
        images = data.load(name, 16)
        alone = torch.stack([images.pixels(i) for i in range(5)])  # the parent reads before it forks
        order = [0, 4, 1, 3, 2] * 8
        together = torch.cat([pixels for pixels, _ in DataLoader(images, 2, sampler=order, num_workers=2)])
        assert data.to_uint8(together).equal(alone[order])
        copy = pickle.loads(pickle.dumps(images))  # what a spawned worker gets
        assert copy.pixels(3).equal(alone[3])
        assert list(copy.captions) == CAPTIONS


def test_a_shard_is_scanned_once_and_again_when_it_changes(shards, cache, monkeypatch):
    scanned = opened(monkeypatch)
    data.load(f"shards:{shards}", 16)
    assert sorted(scanned) == ["a.tar", "b.tar", "c.tar"]
    kept = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    assert len(kept) == 3
    assert not [path for path in cache.iterdir() if path not in kept]  # no half-written file remains
    scanned.clear()
    again = data.load(f"shards:{shards}", 16)
    monkeypatch.chdir(shards.parent)
    assert list(data.load("shards:shards", 8).captions) == list(again.captions) == CAPTIONS
    again.batch(range(5))
    assert scanned == []

    old = (shards / "c.tar").stat()
    write_shard(shards / "c.tar", {**files_of([2]), "padding": bytes(20_000)})  # with the same time
    os.utime(shards / "c.tar", ns=(old.st_atime_ns, old.st_mtime_ns))
    scanned.clear()  # what writing opened
    assert list(data.load(f"shards:{shards}", 16).captions) == CAPTIONS[:3]
    assert scanned == ["c.tar"]
    swapped = (shards / "c.tar").read_bytes().replace(b"a cat", b"a dog")  # with the same size
    (shards / "c.tar").write_bytes(swapped)
    os.utime(shards / "c.tar", ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    assert data.load(f"shards:{shards}", 16).captions[2] == ("a dog",)
    assert scanned == ["c.tar"] * 2
    assert len(list(cache.iterdir())) == 3  # a shard's new index replaces the old one


def test_captions_of_shards_are_read_when_asked_for(shards):
    images = data.load(f"shards:{shards}", 16)
    (shards / "a.tar").rename(shards / "a.moved")
    assert images.captions[2] == CAPTIONS[2]
    with pytest.raises(InputError, match=r"a.tar cannot be read: .*No such file"):
        images.captions[1]
    with pytest.raises(InputError, match=r"a.tar cannot be read: .*No such file"):
        images.pixels(0)


@pytest.mark.parametrize("name", ["captions", "captions:", "shards", "shards:"])
def test_names_need_a_path(name):
    with pytest.raises(InputError, match="is unknown; known: .*captions:PATH, shards:PATH"):
        data.load(name, 16)


def test_folders_without_what_is_needed(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, sentence in [
        (f"captions:{tmp_path / 'gone'}", "gone does not exist; 'captions:PATH' needs images"),
        (f"captions:{tmp_path / 'empty'}", r"empty holds no images \(.bmp, .jpeg"),
        (f"shards:{tmp_path / 'gone'}", "gone is not a folder with .tar files"),
        (f"shards:{tmp_path / 'empty'}", "empty is not a folder with .tar files"),
        (f"shards:{write_shard(tmp_path / 'none' / 'a.tar', {'notes': b''})}", "none hold no samples"),
    ]:
        with pytest.raises(InputError, match=sentence):
            data.load(name, 16)


def test_images_without_captions_are_counted_and_the_first_is_named(folder):
    (folder / "001.txt").unlink()
    (folder / "deep" / "er" / "003.txt").write_text(" \n\n\t")
    with pytest.raises(InputError, match=r"^2 of 5 images in .* have no caption .*, the first is \S*001.jpg$"):
        data.load(f"captions:{folder}", 16)


def test_files_that_are_not_what_their_names_say(folder):
    (folder / "001.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"001.txt is not text in UTF-8"):
        data.load(f"captions:{folder}", 16)
    (folder / "001.txt").write_text("café")
    (folder / "001.jpg").write_text("I am a text")
    with pytest.raises(InputError, match=r"001.jpg is not an image"):
        data.load(f"captions:{folder}", 16)


IMAGE = picture(0)
BAD_SAMPLES = {
    "no text": ({"x.png": IMAGE, "y.png": IMAGE, "y.txt": b"y"}, r"s.tar: sample x has 1 images \(.*\) and 0 .txt"),
    "no image": ({"d/x.txt": b"x", "d/x.json": b"{}"}, r"s.tar: sample d/x has 0 images .* and 1 .txt; .* one of each"),
    "two images": ({"x.png": IMAGE, "x.jpg": IMAGE, "x.txt": b"x"}, "sample x has 2 images"),
    "apart": ({"x.png": IMAGE, "y.png": IMAGE, "x.txt": b"x", "y.txt": b"y"}, "sample x has 1 images .* and 0 .txt"),
    "other folder": ({"a/x.png": IMAGE, "b/x.txt": b"x"}, "sample a/x has 1 images .* and 0 .txt"),
    "blank caption": ({"x.png": IMAGE, "x.txt": b" \n"}, r"s.tar: x.txt is empty"),
    "not UTF-8": ({"x.png": IMAGE, "x.txt": b"caf\xe9"}, r"s.tar: x.txt is not text in UTF-8"),
    "not an image": ({"x.png": b"I am a text", "x.txt": b"x"}, r"s.tar: x.png is not an image"),
}


@pytest.mark.parametrize(("files", "sentence"), BAD_SAMPLES.values(), ids=BAD_SAMPLES.keys())
def test_bad_samples_are_named(tmp_path, cache, files, sentence):
    folder = write_shard(tmp_path / "bad" / "s.tar", {"ok.png": IMAGE, "ok.txt": b"ok", **files})
    for _ in range(2):  # only good shards have their index kept
        with pytest.raises(InputError, match=sentence):
            data.load(f"shards:{folder}", 16)
    assert not cache.exists()


def header_at(content, number):
    """Where header `number` of a shard starts."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return tar.getmembers()[number].offset


DAMAGE = {
    "empty": lambda content: b"",
    "not a tar": lambda content: b"I am a text" * 100,
    "compressed": lambda content: __import__("gzip").compress(content),
    "cut inside a file": lambda content: content[: header_at(content, 2) + 600],
    "cut between two files": lambda content: content[: header_at(content, 3)],
    "cut between two samples": lambda content: content[: header_at(content, 2)],
    "cut inside a header": lambda content: content[: header_at(content, 2) + 100],
    "broken header": lambda content: (
        content[: header_at(content, 2)] + b"\xff" * 512 + content[header_at(content, 2) + 512 :]
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_shards_are_named(tmp_path, damage):
    folder = write_shard(tmp_path / "bad" / "s.tar", files_of())
    content = (folder / "s.tar").read_bytes()
    (folder / "s.tar").write_bytes(damage(content))
    with pytest.raises(InputError, match=r"s.tar cannot be read as an uncompressed tar file: ") as problem:
        data.load(f"shards:{folder}", 16)
    assert "\n" not in str(problem.value)
    (folder / "s.tar").write_bytes(content)
    assert len(data.load(f"shards:{folder}", 16)) == 5


def test_what_is_not_a_readable_shard_is_named(tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.tar").symlink_to(tmp_path / "gone.tar")
    with pytest.raises(InputError, match=r"a.tar cannot be read: .*No such file"):
        data.load(f"shards:{tmp_path / 'links'}", 16)
    (tmp_path / "folders" / "b.tar").mkdir(parents=True)
    with pytest.raises(InputError, match=r"b.tar cannot be read as an uncompressed tar file: .*directory"):
        data.load(f"shards:{tmp_path / 'folders'}", 16)


def test_a_corrupt_image_is_named_when_it_is_read(folder, tmp_path):
    path = folder / "001.jpg"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"001.jpg cannot be read as an image"):
        data.load(f"captions:{folder}", 16).pixels(1)
    long = "d" * 150 + "/"  # too long for a tar header
    files = {long + str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("00*"))}
    images = data.load(f"shards:{write_shard(tmp_path / 'packed' / 's.tar', files)}", 16)
    assert images.captions[2] == CAPTIONS[2]
    with pytest.raises(InputError, match=rf"packed/s.tar: {long}001.jpg cannot be read as an image"):
        images.pixels(1)


def test_a_shard_that_changes_after_it_was_indexed_is_named(shards):
    images = data.load(f"shards:{shards}", 16)
    path = shards / "a.tar"
    content = path.read_bytes()
    path.write_bytes(b"?" * len(content))
    with pytest.raises(InputError, match=r"a.tar: the file at byte \d+ cannot be read as an image"):
        images.pixels(1)
    path.write_bytes(content[:1000])
    with pytest.raises(InputError, match=r"a.tar has become shorter since it was indexed"):
        images.captions[1]


@pytest.mark.parametrize("kind", ["captions", "shards"])
def test_a_text_model_trains_and_resumes_on_captions(kind, folder, shards, tmp_path, tiny_folder):
    model = TextModelConfig(
        width=16,
        heads=2,
        blocks=1,
        patch_size=8,
        image_size=16,
        field_width=4,
        field_blocks=1,
        text_blocks=1,
        text_features=12,
        text_length=8,
    )

    def config(out, name):
        return TrainConfig(
            out=str(tmp_path / out),
            data=name,
            model=model,
            text_encoder=str(tiny_folder),
            steps=3,
            batch_size=4,
            learning_rate=1e-2,
            workers=1,
        )

    name = f"{kind}:{folder if kind == 'captions' else shards}"
    losses = [float(record.loss) for record in train(config("straight", name), torch.device("cpu"))]
    stopped = []
    for stop in (2, None):
        for record in train(config("stopped", name), torch.device("cpu")):
            stopped.append(float(record.loss))
            if record.step == stop:
                break
    assert stopped == losses
    assert len(set(losses)) == 3
    other = f"captions:{folder}" if kind == "shards" else f"shards:{shards}"
    assert losses == [float(record.loss) for record in train(config("other", other), torch.device("cpu"))]


def test_data_prints_captions_and_shows_the_images(folder, shards, tmp_path, capsys):
    for name in (f"captions:{folder}", f"shards:{shards}"):
        sheet = tmp_path / name.partition(":")[0] / "sheet.png"
        main(["data", name, "--show", "--image-size", "16", "--out", str(sheet)])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"{name}: 5 images of 3x16x16"
        assert lines[1] == "  image: 5"
        examples = [line.removeprefix("  image ").split(": ") for line in lines[2:5]]
        assert len({index for index, _ in examples}) == 3
        assert all(CAPTIONS[int(index)][0] == caption for index, caption in examples)
        assert lines[5:] == [f"contact sheet: {sheet}"]
        assert Image.open(sheet).width > 5 * 16
    main(["data", "digits"])
    assert "  image " not in capsys.readouterr().out


# --- labels --------------------------------------------------------------------------------------------------------


def labelled(labels, captions=None):
    """Name → bytes of samples with a .cls and, if there are captions, a .txt."""
    files = {}
    for index, label in enumerate(labels):
        files[f"{index:03}.png"] = picture(index)
        files[f"{index:03}.cls"] = b"%d" % label if isinstance(label, int) else label
        if captions:
            files[f"{index:03}.txt"] = captions[index].encode()
    return files


def test_shards_with_labels_alone_have_classes(tmp_path):
    write_shard(tmp_path / "f" / "a.tar", labelled([3, 0]))
    write_shard(tmp_path / "f" / "B.TAR", labelled([5, b"1\n"]))
    (tmp_path / "f" / "._a.tar").write_bytes(b"\0\5\x16\7")
    for _ in range(2):  # scanned, then from the index
        images = data.load(f"shards:{tmp_path / 'f'}", 16)
        assert images.labels.tolist() == [5, 1, 3, 0]
        assert images.classes == ["0", "1", "2", "3", "4", "5"]
        assert list(images.captions) == []
    assert images.batch([2, 0])[1].tolist() == [3, 5]
    loose = write_files(tmp_path / "loose", {"0/x.png": picture(1)})
    assert images.pixels(3).equal(data.load(f"folder:{loose}", 16).pixels(0))


def test_shards_may_have_labels_and_captions(tmp_path):
    write_shard(tmp_path / "f" / "a.tar", labelled([1, 0], ["a cat", "a dog\ndogs"]))
    images = data.load(f"shards:{tmp_path / 'f'}", 16)
    assert (images.labels.tolist(), list(images.captions)) == ([1, 0], [("a cat",), ("a dog", "dogs")])


@pytest.mark.parametrize("label", [b"", b"cat", b"-1", b"1.0", b"100000", b"1 2", b"\xd9\xa1"])
def test_a_label_is_a_whole_number(tmp_path, label):
    write_shard(tmp_path / "f" / "a.tar", labelled([0, label]))
    with pytest.raises(InputError, match=r"a.tar: 001.cls is .*; a label is a whole number below 100,000$"):
        data.load(f"shards:{tmp_path / 'f'}", 16)


def test_either_all_samples_have_a_label_or_none(tmp_path):
    write_shard(tmp_path / "f" / "a.tar", files_of([0]))
    write_shard(tmp_path / "f" / "b.tar", labelled([1, 2]))
    with pytest.raises(InputError, match=r"1 of 3 samples have no .cls, the first is \S*/a.tar: 000.png; all need"):
        data.load(f"shards:{tmp_path / 'f'}", 16)
    write_shard(tmp_path / "f" / "a.tar", labelled([0], ["a cat"]))
    with pytest.raises(InputError, match=r"2 of 3 samples have no .txt, the first is \S*/b.tar: 000.png; all need"):
        data.load(f"shards:{tmp_path / 'f'}", 16)


def test_hidden_folders_in_shards_are_ignored(tmp_path):
    files = {"./000.png": picture(0), "./000.cls": b"0", "__MACOSX/001.png": b"-", ".cache/002.png": b"-"}
    write_shard(tmp_path / "f" / "a.tar", files)
    assert len(data.load(f"shards:{tmp_path / 'f'}", 16)) == 1


def test_an_index_that_is_damaged_or_of_an_earlier_version_is_made_again(shards, cache, monkeypatch):
    data.load(f"shards:{shards}", 16)
    scanned = opened(monkeypatch)
    for spoil in (b"", b"PK\3\4 cut", "rows", "samples"):
        for path in cache.iterdir():
            if isinstance(spoil, bytes):
                path.write_bytes(spoil)
                continue
            with np.load(path) as file:  # before labels were read
                stamp, rows = file["stamp"], file["samples"][:, :4]
            np.savez(path, stamp=stamp, **{spoil: rows})
        assert list(data.load(f"shards:{shards}", 16).captions) == CAPTIONS
        assert sorted(scanned) == ["a.tar", "b.tar", "c.tar"]
        scanned.clear()


def test_a_class_conditional_model_trains_on_labelled_shards(tmp_path):
    write_shard(tmp_path / "f" / "a.tar", labelled([2, 0, 1]))
    tiny = ["--size", "nano/8", "--model.image-size", "16", "--batch-size", "2", "--steps", "2", "--compile", "off"]
    main(["train", "--data", f"shards:{tmp_path / 'f'}", "--out", str(tmp_path / "run"), *tiny])
    assert load(tmp_path / "run").num_classes == 3
