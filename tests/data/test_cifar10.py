import functools
import hashlib
import http.server
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from pixnerd import InputError, data
from pixnerd.data.dataset import cache_folder

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def pickled(path, content):
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def server(tmp_path):
    """The address of a web server for the folder "made"."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=tmp_path / "made")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def archive(tmp_path, monkeypatch, server):
    """Twelve training and four test images in an archive of CIFAR-10's layout, on a server of this machine."""
    folder = tmp_path / "made" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rows = np.random.default_rng(0).integers(0, 256, (16, 3072), dtype=np.uint8)
    parts = {"data_batch_1": slice(0, 7), "data_batch_2": slice(7, 12), "test_batch": slice(12, 16)}
    labels = [i % 10 for i in range(16)]
    sums = {name: pickled(folder / name, {"data": rows[s], "labels": labels[s]}) for name, s in parts.items()}
    meta = pickled(folder / "batches.meta", {"label_names": CLASSES})
    path = tmp_path / "made" / CIFAR10.filename
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, CIFAR10.base_folder)
    monkeypatch.setenv("PIXNERD_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(CIFAR10, "url", f"{server}/{path.name}")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in parts if name != "test_batch"])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": meta})
    return rows


def test_it_is_fetched_once_and_read_plane_by_plane(archive, monkeypatch):
    train = data.load("cifar10", 32)
    assert (len(train), train.channels, train.classes) == (12, 3, CLASSES)
    assert train.labels.tolist() == [*range(10), 0, 1]
    for index in (0, 8):
        assert train.pixels(index).equal(torch.from_numpy(archive[index]).view(3, 32, 32))
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/nothing")  # the copy suffices from now on
    monkeypatch.setattr("filelock.FileLock.acquire", lambda *_: pytest.fail("a folder to read has no lock"))
    test = data.load("cifar10:test", 32)
    assert test.labels.tolist() == [2, 3, 4, 5]
    assert test.pixels(0).equal(torch.from_numpy(archive[12]).view(3, 32, 32))


def test_other_sizes_are_scaled(archive):
    for size in (16, 48):
        scaled = data.load("cifar10", size).pixels(3)
        assert scaled.shape == (3, size, size)
        means = scaled.float().mean((1, 2)), torch.from_numpy(archive[3]).view(3, -1).float().mean(1)
        torch.testing.assert_close(*means, atol=3, rtol=0)


def test_a_damaged_copy_is_named(archive, monkeypatch):
    data.load("cifar10", 32)
    folder = cache_folder() / "cifar10"
    (folder / CIFAR10.base_folder / "data_batch_2").write_bytes(b"damaged")
    (folder / CIFAR10.filename).write_bytes(b"damaged")
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/nothing")
    with pytest.raises(InputError, match="CIFAR-10 could not be fetched"):
        data.load("cifar10", 32)


def test_without_network_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXNERD_DATA", str(tmp_path))
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/nothing")
    with pytest.raises(InputError, match=r"could not be fetched from http.*put cifar-10-python\.tar\.gz into"):
        data.load("cifar10", 32)


def test_unknown_words_are_refused():
    with pytest.raises(InputError, match="no split 'train2'"):
        data.load("cifar10:train2", 32)
