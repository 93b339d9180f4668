"""Work that the leading process does first: by three processes that talk through a file (gloo)."""

import tarfile

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from pixnerd import InputError
from pixnerd.data import captions, pictures
from pixnerd.distributed import World
from pixnerd.training import TrainConfig
from pixnerd.training.batches import load_datasets


def in_processes(work, folder):
    """work(world, folder) in three processes; what each returned, by rank."""
    torch.multiprocessing.spawn(_begin, (work, folder), nprocs=3)
    return [(folder / f"{rank}.out").read_text() for rank in range(3)]


def _begin(rank, work, folder):
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=3)
    (folder / f"{rank}.out").write_text(work(World(rank, 3, torch.device("cpu")), folder))
    dist.destroy_process_group()


def note(folder, word):
    with (folder / "notes").open("a") as file:
        file.write(f"{word}\n")


def one_then_the_others(world, folder):
    world.leader_first(lambda: note(folder, world.rank))
    return ""


def refused_by_the_leader(world, folder):
    def work():
        note(folder, world.rank)
        raise InputError("the sentence")

    with pytest.raises(InputError) as refused:
        world.leader_first(work)
    return str(refused.value)


def counted(world, folder):
    """Open pictures and shards as training does, noting who looks at a header and who scans a shard."""
    header, scan = pictures.check_header, captions._scan
    pictures.check_header = lambda source, name: note(folder, f"header {world.rank}") or header(source, name)
    captions._scan = lambda shard: note(folder, f"scan {world.rank}") or scan(shard)
    for name in ("folder", "shards"):
        config = TrainConfig(data=f"{name}:{folder / name}", decode_sizes=(256, 512))
        datasets = load_datasets(config, world)
        assert {size: data.pixels(0).shape[-1] for size, data in datasets.items()} == {256: 256, 512: 512}
    return ""


def test_the_others_wait_for_the_leader(tmp_path):
    in_processes(one_then_the_others, tmp_path)
    first, *others = (tmp_path / "notes").read_text().split()
    assert (first, sorted(others)) == ("0", ["1", "2"])


def test_what_the_leader_refuses_nobody_does(tmp_path):
    said = in_processes(refused_by_the_leader, tmp_path)
    assert (tmp_path / "notes").read_text().split() == ["0"]
    assert said == ["the sentence", *["the leading process has refused the input, see its message"] * 2]


def test_one_process_checks_headers_and_indexes_shards_and_only_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXNERD_DATA", str(tmp_path / "cache"))
    for name in ("folder/class", "shards"):
        (tmp_path / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "folder/class/0.png")
    (tmp_path / "0.cls").write_text("0")
    with tarfile.open(tmp_path / "shards/0.tar", "w") as tar:
        tar.add(tmp_path / "folder/class/0.png", "0.png")
        tar.add(tmp_path / "0.cls", "0.cls")
    in_processes(counted, tmp_path)
    assert (tmp_path / "notes").read_text().splitlines() == ["header 0", "scan 0"]
