import json
import multiprocessing
import os
import pickle
import shutil
import signal
from collections import namedtuple

import filelock
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pixnerd import InputError, data
from pixnerd.cli import main
from pixnerd.data import prepared

COUNT = 14  # with four images per shard: three full shards and one of two


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(prepared, "SHARD_IMAGES", 4)


@pytest.fixture
def root(tmp_path):
    """Photos of three classes: of all shapes, also grey and CMYK, some rotated."""
    rng = np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    for index in range(COUNT):
        path = tmp_path / "photos" / "abc"[index % 3] / f"{index:02}.{'webp' if index == 5 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((20 + 5 * index, 44))
        mode = {3: "L", 4: "CMYK"}.get(index, "RGB")
        noise.convert(mode).save(path, **({"exif": turned} if index % 4 == 1 else {}))
    return tmp_path / "photos"


def name_of(root):
    return f"folder:{root}"


def source_of(root):
    return data.load(name_of(root), 16)


def prepare(root, folder, workers=0):
    return data.prepare(source_of(root), name_of(root), folder, workers)


def shard_files(folder):
    """What changes when a file is rewritten: name → inode, time."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(folder.glob("0*"))}


def stop_at(monkeypatch, calls, stop):
    """Call `stop` at the `calls`th read of an image from a folder."""
    original, count = data.ImageFolder.pixels, iter(range(1, 10_000))

    def pixels(self, index):
        if next(count) == calls:
            stop()
        return original(self, index)

    monkeypatch.setattr(data.ImageFolder, "pixels", pixels)


def test_a_copy_is_its_source(root, tmp_path):
    prepare(root, tmp_path / "copy")
    copy, source = data.load(f"prepared:{tmp_path / 'copy'}", 16), source_of(root)
    assert (len(copy), copy.channels, copy.image_size) == (COUNT, 3, 16)
    assert copy.classes == source.classes == ["a", "b", "c"]
    assert copy.labels.equal(source.labels)
    assert copy.pixels(0).dtype == torch.uint8
    for index in [*range(COUNT), -1, -COUNT]:
        assert copy.pixels(index).equal(source.pixels(index % COUNT)), index
    with pytest.raises(IndexError):
        copy.pixels(COUNT)
    assert copy[3][0].equal(source[3][0])
    assert len({copy.pixels(index).numpy().tobytes() for index in range(COUNT)}) == COUNT


def test_shards_are_plain_numpy_files(root, tmp_path):
    folder = tmp_path / "copy"
    prepare(root, folder)
    shards = [np.load(folder / f"{number:05}.npy") for number in range(4)]
    assert [shard.shape for shard in shards] == [(4, 3, 16, 16)] * 3 + [(2, 3, 16, 16)]
    source = source_of(root)
    assert torch.from_numpy(np.concatenate(shards)).equal(torch.stack([source.pixels(i) for i in range(COUNT)]))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["source"], manifest["images"], manifest["skipped"]) == (name_of(root), COUNT, 0)
    assert manifest["labels"] == source.labels.tolist()
    assert manifest["versions"].keys() == {"pixnerd", "pillow", "numpy"}
    assert [path.name for path in folder.glob(".*")] == [".lock"]
    assert (folder / "skipped.txt").read_text() == ""


def test_one_channel_and_full_size_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "SHARD_IMAGES", 5000)
    monkeypatch.setattr(prepared, "SHARD_BYTES", 2000 * 28 * 28 + 1)
    digits = data.load("digits", 28)
    copy = data.prepare(digits, "digits", tmp_path / "copy", 0).images
    assert [len(np.load(path)) for path in sorted((tmp_path / "copy").glob("*.npy"))] == [2000, 2000, 1000]
    assert copy.channels == 1
    assert copy.batch(range(5000))[0].equal(digits.batch(range(5000))[0])
    assert copy.labels.equal(digits.labels)


def test_processes_write_the_same(root, tmp_path):
    prepare(root, tmp_path / "one")
    prepare(root, tmp_path / "many", workers=2)
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes(), path.name


def test_a_loader_reads_it_in_processes(root, tmp_path):
    copy = prepare(root, tmp_path / "copy").images
    order = [13, 0, 5, 4, 8, 3]
    together = torch.cat([pixels for pixels, _ in DataLoader(copy, 2, sampler=order, num_workers=2)])
    assert together.equal(torch.stack([source_of(root)[index][0] for index in order]))
    pickled = pickle.dumps(copy)  # what a spawned worker gets
    assert len(pickled) < 10_000
    assert pickle.loads(pickled).pixels(6).equal(copy.pixels(6))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupted_copy_goes_on(root, tmp_path, monkeypatch, workers):
    prepare(root, tmp_path / "whole")
    folder = tmp_path / "copy"

    def fail():
        raise RuntimeError("the power went")

    with monkeypatch.context() as patch:
        stop_at(patch, 11, fail)  # in the third shard
        with pytest.raises(RuntimeError, match="the power went"):
            prepare(root, folder, workers)
    states = shard_files(folder)  # a worker may have reached the fourth shard before it was stopped
    before = {name: state for name, state in states.items() if name[:5] != "00003" or workers == 0}
    assert list(before) == ["00000.json", "00000.npy", "00001.json", "00001.npy"]
    with pytest.raises(InputError, match="copy is not finished: the same `pixnerd prepare` command resumes it"):
        data.load(f"prepared:{folder}", 16)
    prepare(root, folder, workers)
    assert {name: state for name, state in shard_files(folder).items() if name in before} == before
    for name in ("manifest.json", "skipped.txt", "00003.npy"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    after = shard_files(folder)
    prepare(root, folder, workers)
    assert shard_files(folder) == after


def test_a_kill_in_the_middle_of_a_write_leaves_no_half_shard(root, tmp_path, monkeypatch):
    prepare(root, tmp_path / "whole")
    folder, save = tmp_path / "copy", np.save

    def killed(file, images):
        if len(images) < 4:  # the last shard
            file.write_bytes(b"\x93NUMPY half of a shard")
            os.kill(os.getpid(), signal.SIGKILL)
        save(file, images)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", killed)
        process = multiprocessing.get_context("fork").Process(target=prepare, args=(root, folder))
        process.start()
        process.join(300)
    assert process.exitcode == -signal.SIGKILL
    before = shard_files(folder)
    assert "00002.npy" in before
    assert "00003.npy" not in before
    prepare(root, folder)
    assert {name: state for name, state in shard_files(folder).items() if name in before} == before
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )
    assert (folder / "manifest.json").read_bytes() == (tmp_path / "whole" / "manifest.json").read_bytes()


def test_a_flipped_byte_is_found_and_repaired(root, tmp_path):
    folder = tmp_path / "copy"
    copy = prepare(root, folder).images
    copy.verify()
    before, manifest = shard_files(folder), (folder / "manifest.json").read_bytes()
    damaged = bytearray((folder / "00001.npy").read_bytes())
    damaged[-5] ^= 1
    (folder / "00001.npy").write_bytes(damaged)
    with pytest.raises(InputError, match=r"00001\.npy is damaged \(its sha256 differs\): remove it"):
        data.load(f"prepared:{folder}", 16).verify()
    with pytest.raises(InputError, match=r"00001\.npy is damaged"):
        prepare(root, folder)
    (folder / "00001.npy").unlink()
    prepare(root, folder).images.verify()
    assert (folder / "manifest.json").read_bytes() == manifest
    changed = {name for name, state in shard_files(folder).items() if state != before[name]}
    assert changed == {"00001.npy", "00001.json"}


def test_lost_bytes_are_named(root, tmp_path):
    folder = tmp_path / "copy"
    copy = prepare(root, folder).images
    path = folder / "00002.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"00002\.npy has \d+ bytes instead of \d+"):
        data.load(f"prepared:{folder}", 16)
    with pytest.raises(InputError, match=r"00002\.npy has become shorter"):
        copy.pixels(11)
    assert prepare(root, folder).images.pixels(11).equal(source_of(root).pixels(11))
    path.unlink()
    with pytest.raises(InputError, match=r"00002\.npy is missing"):
        data.load(f"prepared:{folder}", 16)
    with pytest.raises(InputError, match=r"00002\.npy cannot be read"):
        copy.pixels(8)
    assert prepare(root, folder).images.pixels(11).equal(source_of(root).pixels(11))


def test_another_image_size_is_refused(root, tmp_path):
    prepare(root, tmp_path / "copy")
    with pytest.raises(InputError, match=r"was prepared at 16x16, not at 32x32: ask for image size 16"):
        data.load(f"prepared:{tmp_path / 'copy'}", 32)


@pytest.mark.parametrize("text", ["{", "[]", '{"source": "x"}'])
def test_a_folder_without_a_copy_is_refused(tmp_path, text):
    with pytest.raises(InputError, match=r"holds no manifest\.json; 'prepared:PATH' needs"):
        data.load(f"prepared:{tmp_path}", 16)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json (cannot be read|is not one of)"):
        data.load(f"prepared:{tmp_path}", 16)


def test_bad_images_are_named_and_left_out(root, tmp_path):
    source = source_of(root)
    bad = [source.paths[index] for index in (1, 4, 13)]
    bad[0].write_bytes(bad[0].read_bytes()[:-200])
    bad[1].unlink()
    bad[2].write_text("I am a text")
    copy = data.prepare(source, name_of(root), tmp_path / "copy", 2)
    assert copy.kept.tolist() == [0, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12]
    assert copy.images.labels.equal(source.labels[copy.kept])
    assert all(copy.images.pixels(place).equal(source.pixels(i)) for place, i in enumerate(copy.kept.tolist()))
    sentences = (tmp_path / "copy" / "skipped.txt").read_text().splitlines()
    assert sentences == copy.skipped
    assert [str(path) in sentence for path, sentence in zip(bad, sentences, strict=True)] == [True] * 3


def test_a_shard_without_one_good_image_stops_the_work(root, tmp_path):
    source = source_of(root)
    for path in source.paths[4:8]:
        path.unlink()
    with pytest.raises(InputError, match=rf"none of the images 4 to 7 can be read: {source.paths[4]}"):
        data.prepare(source, name_of(root), tmp_path / "copy", 1)
    assert "00001.npy" not in shard_files(tmp_path / "copy")


def test_a_longer_last_shard_without_one_good_image_stops_the_work(root, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "FEW", 1)
    source = source_of(root)
    for path in source.paths[12:]:
        path.unlink()
    with pytest.raises(InputError, match="none of the images 12 to 13 can be read"):
        data.prepare(source, name_of(root), tmp_path / "copy", 0)


def test_a_short_last_shard_may_have_no_good_image(root, tmp_path):
    """The two images behind three full shards; nothing is said of a disk that has gone."""
    source = source_of(root)
    for path in source.paths[12:]:
        path.unlink()
    for _ in range(2):  # a finished copy is only checked
        copy = data.prepare(source, name_of(root), tmp_path / "copy", 1)
        assert copy.kept.tolist() == list(range(12))
        assert len(copy.skipped) == 2
    assert len(data.load(f"prepared:{tmp_path / 'copy'}", 16)) == 12


def test_two_processes_do_not_write_one_copy(root, tmp_path, monkeypatch):
    """Nor does one remove the half-written files of the other; what a killed one left is no obstacle."""
    monkeypatch.setattr("pixnerd.files.PATIENCE", 0.1)
    (tmp_path / "copy").mkdir()
    other = filelock.FileLock(tmp_path / "copy" / ".lock", timeout=0)
    (tmp_path / "copy" / ".1.partial-plan.json").write_text("{")
    with other, pytest.raises(InputError, match="copy is being prepared by another process: wait for its end"):
        prepare(root, tmp_path / "copy")
    assert (tmp_path / "copy" / ".1.partial-plan.json").exists()
    assert len(prepare(root, tmp_path / "copy").images) == COUNT
    assert not (tmp_path / "copy" / ".1.partial-plan.json").exists()
    with other:  # released at the end
        pass


def test_a_process_that_waited_does_not_take_the_others_copy_for_its_own(root, tmp_path, monkeypatch):
    """Both began with an empty folder."""
    other = tmp_path / "other"
    shutil.copytree(root, other)
    claim = prepared.hold

    def after_the_other(folder, busy):
        monkeypatch.setattr(prepared, "hold", claim)
        prepare(other, folder)
        return claim(folder, busy)

    monkeypatch.setattr(prepared, "hold", after_the_other)
    with pytest.raises(InputError, match="already holds another copy .source"):
        prepare(root, tmp_path / "copy")
    with filelock.FileLock(tmp_path / "copy" / ".lock", timeout=0):  # released
        pass


def test_folders_with_other_contents_are_refused(root, tmp_path):
    prepare(root, tmp_path / "copy")
    with pytest.raises(InputError, match="already holds another copy .image size 16 there, 8 asked for.: choose"):
        data.prepare(data.load(name_of(root), 8), name_of(root), tmp_path / "copy", 0)
    shutil.copy(root / "a" / "00.jpg", root / "a" / "more.jpg")
    with pytest.raises(InputError, match=r"images 14 there, 15 asked for; labels \w{16} there"):
        prepare(root, tmp_path / "copy")
    with pytest.raises(InputError, match="is not empty and holds no prepared copy"):
        prepare(root, root)
    with pytest.raises(InputError, match=r"00\.jpg is a file; the output has to be a folder"):
        prepare(root, root / "a" / "00.jpg")


def test_unsuitable_data_sets_are_refused(root, tmp_path, monkeypatch):
    source = source_of(root)
    with pytest.raises(InputError, match="workers is -1; it cannot be negative"):
        prepare(root, tmp_path / "copy", workers=-1)
    disk = namedtuple("Disk", "free")(3 * 16 * 16 * COUNT - 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: disk)
        with pytest.raises(InputError, match=r"copy needs 0\.0 GB more, and its disk has 0\.0 GB left"):
            prepare(root, tmp_path / "copy")

    def full(file, images):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(InputError, match=r"00000\.npy cannot be written \(No space left"):
            prepare(root, tmp_path / "copy", workers=1)
    source.captions = [("a photo",)] * COUNT
    with pytest.raises(InputError, match="has captions, which a prepared copy does not keep"):
        data.prepare(source, name_of(root), tmp_path / "other", 0)
    assert not (tmp_path / "other").exists()


def test_speeds_are_of_the_same_images(root, tmp_path):
    copy, source = prepare(root, tmp_path / "copy"), source_of(root)
    speeds = data.read_speeds(source, copy, 5)
    assert speeds.images == 5
    assert min(speeds.source, speeds.copy) > 0
    assert str(speeds).startswith(f"reading 5 random images in one process on {os.cpu_count()} cores of ")
    assert str(speeds).endswith(f"{speeds.copy / speeds.source:.1f} times as fast")
    Image.new("RGB", (20, 20)).save(source.paths[2])
    with pytest.raises(InputError, match=f"image 2 of {tmp_path / 'copy'} is no longer that of folder:"):
        data.read_speeds(source, copy)


def test_speeds_are_images_by_seconds(root, tmp_path, monkeypatch):
    """By a clock that only reading moves: by 2 s in the source, by 0.5 s in the copy."""
    copy, source = prepare(root, tmp_path / "copy"), source_of(root)
    now = [100.0]
    for dataset, seconds in ((source, 2.0), (copy.images, 0.5)):
        pixels = dataset.pixels

        def timed(index, pixels=pixels, seconds=seconds):
            now[0] += seconds
            return pixels(index)

        monkeypatch.setattr(dataset, "pixels", timed)
    monkeypatch.setattr(prepared.time, "perf_counter", lambda: now[0])
    speeds = data.read_speeds(source, copy)
    assert (speeds.images, speeds.source, speeds.copy) == (COUNT, 0.5, 2.0)


def test_from_the_command_line(root, tmp_path, capsys):
    bad = root / "b" / "01.jpg"
    bad.write_text("I am a text")
    command = ["prepare", f"folder:{root}", "--out", str(tmp_path / "copy"), "--image-size", "16", "--workers", "2"]
    main(command)
    out = capsys.readouterr().out
    assert "reading 13 random images in one process on " in out
    assert (
        f"1 of 14 images cannot be read and are left out, see {tmp_path / 'copy' / 'skipped.txt'}; the first: " in out
    )
    assert f"{bad} cannot be read as an image" in out
    assert f"prepared: 13 images in {tmp_path / 'copy'}" in out
    tiny = ["--size", "nano/8", "--model.image-size", "16", "--batch-size", "4", "--steps", "1", "--workers", "1"]
    main(["train", "--data", f"prepared:{tmp_path / 'copy'}", "--out", str(tmp_path / "run"), *tiny])
    assert (tmp_path / "run" / "checkpoints" / "step-1").is_dir()
    shard = tmp_path / "copy" / "00000.npy"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert "00000.npy is damaged" in capsys.readouterr().err


def test_names_that_are_not_utf_8(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path / "f"), b"caf\xe9")
    try:
        os.makedirs(folder)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    for name, content in ((b"\xe9.png", None), (b"bad\xe9.png", b"\x89PNG\r\n\x1a\n cut")):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content) if content else Image.new("RGB", (8, 8)).save(file, "PNG")
    source = data.open_data_set(f"folder:{tmp_path / 'f'}", 8)
    copy = data.prepare(source, "f", tmp_path / "copy", workers=0)
    assert copy.images.classes == source.classes == [os.fsdecode(b"caf\xe9")]
    assert len(copy.images) == 1
    assert r"bad\udce9.png cannot be read as an image" in (tmp_path / "copy/skipped.txt").read_text()


@pytest.mark.parametrize("spoil", ["", "{", "[]", '{"file": "00001.npy"}', None])
def test_a_damaged_record_of_a_shard_is_made_again(root, tmp_path, spoil):
    source, folder = source_of(root), tmp_path / "copy"
    data.prepare(source, name_of(root), folder, workers=0)
    path, manifest = folder / "00001.json", (folder / "manifest.json").read_bytes()
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "images": record["images"] - 1}) if spoil is None else spoil)
    data.prepare(source, name_of(root), folder, workers=0)
    assert json.loads(path.read_text()) == record
    assert (folder / "manifest.json").read_bytes() == manifest


WRONG = {
    "a label beyond the classes": lambda m: m["labels"].__setitem__(0, 3),
    "a negative label": lambda m: m["labels"].__setitem__(0, -1),
    "a label that is text": lambda m: m["labels"].__setitem__(0, "0"),
    "a label too many": lambda m: m["labels"].append(0),
    "no shards": lambda m: m.update(shards=[]),
    "another folder's file": lambda m: m["shards"][0].update(file="../00000.npy"),
    "more images than bytes": lambda m: m["shards"][0].update(bytes=100),
    "a size that is text": lambda m: m.update(channels="3"),
    "channels that are true": lambda m: m.update(channels=True),
    "half an image": lambda m: m["shards"][0].update(images=3.5),
    "no sha256": lambda m: m["shards"][0].pop("sha256"),
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG.keys())
def test_a_manifest_whose_entries_do_not_fit_is_refused(root, tmp_path, spoil):
    data.prepare(source_of(root), name_of(root), tmp_path / "copy", workers=0)
    manifest = json.loads((tmp_path / "copy/manifest.json").read_text())
    spoil(manifest)
    (tmp_path / "copy/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest.json is not one of `pixnerd prepare`, or is damaged: "):
        data.load(f"prepared:{tmp_path / 'copy'}", manifest["image_size"])
