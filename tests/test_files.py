"""Files appear complete or not at all."""

import errno
import json
import os

import pytest

from pixnerd import InputError
from pixnerd.errors import WriteError
from pixnerd.files import check_output_file, make_folder, read_json, remove_partial_files, replacing, write_atomically


def test_a_file_is_replaced_only_when_the_block_succeeds(tmp_path):
    path = tmp_path / "a.npz"
    write_atomically(path, "old")

    def stop_half_way():
        with replacing(path) as partial:
            assert partial.suffix == ".npz"  # or numpy would append it
            partial.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_half_way()
    assert (path.read_text(), [p.name for p in tmp_path.iterdir()]) == ("old", ["a.npz"])
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert (path.read_text(), [p.name for p in tmp_path.iterdir()]) == ("new", ["a.npz"])


def test_processes_of_one_number_on_two_machines_write_different_files(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 123)
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "inside", tmp_path / ("x" * 300)):
        with pytest.raises(WriteError, match=r"cannot be written \(.+\): name another place") as refused:
            make_folder(place)
        assert str(place) in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(WriteError, match="is a folder; the output has to be a file"):
        check_output_file(tmp_path)
    check_output_file(tmp_path / "new" / "a.png")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["new"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    write_atomically(tmp_path / "a", "old")

    def fill_the_disk():
        with replacing(tmp_path / "a") as partial:
            partial.write_text("ha")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(WriteError, match="make room there"):
        fill_the_disk()
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_only_what_a_killed_process_leaves_is_removed(tmp_path):
    for name in (".123.partial-a.npz", ".hidden", "partial-a.npz"):
        (tmp_path / name).write_text("")
    remove_partial_files(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "partial-a.npz"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "does not exist"), (b"{", "cannot be read as a list"), (b"[1]", "an object"), (b"\xff", "cannot be read")],
)
def test_json_that_cannot_be_read_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words) as refused:
        read_json(path, "a list")
    assert "\n" not in str(refused.value)
    path.write_text(json.dumps({"a": 1}))
    assert read_json(path, "a list") == {"a": 1}
