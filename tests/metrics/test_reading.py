"""Four processes on a CPU read a reference together: each image once in all, and with the figures of one process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixnerd import InputError
from pixnerd.distributed import World
from pixnerd.metrics.features import check_shared, full_float32, own_batches
from pixnerd.metrics.images import content_of, open_images

from .reading_worker import COUNT

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def measured(folder, processes, workers):
    """The images read, in any order, and what was found of them."""
    folder.mkdir()
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *torchrun, "-m", "tests.metrics.reading_worker", str(folder), str(workers)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    reads = sorted(int(line) for line in (folder / "reads").read_text().split())
    return reads, torch.load(folder / "found.pt", weights_only=True)


def test_four_processes_read_each_image_once_and_find_what_one_finds(tmp_path):
    reads, alone = measured(tmp_path / "one", 1, 0)
    assert reads == list(range(COUNT))
    for workers in (0, 2):
        reads, together = measured(tmp_path / f"four-{workers}", 4, workers)
        assert reads == list(range(COUNT))
        assert torch.equal(together["rows"], alone["rows"])
        for name in ("mean", "covariance"):
            torch.testing.assert_close(together[name], alone[name], rtol=1e-12, atol=1e-9)


def save(path, pixels):
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (11, 6, 5, 3), dtype=np.uint8)):
        save(tmp_path / "pictures" / f"{index:02}.png", pixels)
    return tmp_path / "pictures"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("packed", [None, np.savez, np.savez_compressed], ids=["folder", "stored", "compressed"])
def test_shares_of_every_kind_of_source_are_the_whole(folder, packed, workers):
    whole = torch.cat(list(open_images(folder).batches(4)))
    source = folder
    if packed:
        source = folder.with_name("images.npz")
        packed(source, arr_0=whole.permute(0, 2, 3, 1).numpy())
    found = torch.zeros_like(whole)
    for rank in range(3):
        for first, batch in own_batches(open_images(source), 2, World(rank, 3, CPU), workers):
            assert not found[first : first + len(batch)].any()
            found[first : first + len(batch)] = batch
    assert torch.equal(found, whole)


def test_a_picture_of_another_size_is_named_whoever_reads_it(folder):
    save(folder / "03.png", np.zeros((6, 6, 3), np.uint8))
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"03.png has \(6, 6\) pixels, those before it \(6, 5\)"):
            list(own_batches(open_images(folder), 3, World(1, 2, CPU), workers))


def test_content_changes_with_the_files_and_not_with_the_name(folder):
    before = content_of(str(folder))
    assert content_of(f"folder:{folder}") == before
    save(folder / "00.png", np.zeros((6, 5, 3), np.uint8))
    assert content_of(str(folder)) != before
    file = folder / "00.png"
    assert content_of(str(file)) == content_of(str(file.rename(folder / "renamed.png")))
    assert [content_of(name) for name in ("digits", "emoji:held-out", "facebook/dinov2-base", "", None)] == [None] * 5


def test_a_data_set_comes_before_a_folder_of_its_name(folder, monkeypatch):
    """A run called digits, in whose parent folder somebody evaluates, must not become its own reference."""
    namesake = folder.rename(folder.with_name("digits"))
    (namesake.parent / "held-out").mkdir()
    monkeypatch.chdir(namesake.parent)
    assert open_images("digits", 32).count == 5000
    assert open_images("./digits", 8).count == open_images("digits").count == len(list(namesake.iterdir()))
    assert [content_of(name) for name in ("digits", "shapes:held-out")] == [None] * 2
    assert content_of("./digits") == content_of("folder:digits") is not None


def test_a_name_that_is_no_utf_8_has_a_content(folder):
    before = content_of(str(folder))
    (folder / "00.png").rename(os.fsdecode(os.fsencode(folder) + b"/\xe9.png"))
    assert content_of(str(folder)) not in (before, None)


@pytest.mark.parametrize("newer", [False, True])
def test_tf32_is_off_inside_and_as_it_was_afterwards(newer):
    """Whether it was switched on by torch's older settings, one of which is on by default, or by the newer ones."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [backend.fp32_precision for backend in backends]
    try:
        if newer:
            for backend in backends:
                backend.fp32_precision = "tf32"
        else:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        on = [backend.fp32_precision for backend in backends]
        assert on == ["tf32", "tf32"]
        with full_float32():
            assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
        assert [backend.fp32_precision for backend in backends] == on
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def test_processes_without_a_batch_are_noticed_before_any_is_read():
    check_shared(9, 4, World(2, 3, CPU))
    with pytest.raises(InputError, match="8 images make too few batches of 4 for 3 processes"):
        check_shared(8, 4, World(0, 3, CPU))
