"""Files appear complete or not at all."""

import json

import pytest

from pixnerd import InputError
from pixnerd.files import read_json, remove_partial_files, replacing, write_atomically


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
