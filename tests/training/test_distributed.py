"""Two processes on a CPU (gloo), started by torchrun as on a cluster, against one that computes everything."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import deserialize

from pixnerd import InputError, load
from pixnerd.checkpoints import load_training_state
from pixnerd.conditions import Labels
from pixnerd.distributed import ALONE, World, join
from pixnerd.runs import Run
from pixnerd.signals import STOPPED
from pixnerd.training import train
from pixnerd.training.loop import Job, build_models
from pixnerd.training.losses import Projector, VelocityLoss

from . import distributed_worker
from .distributed_worker import KILLED_AFTER, STEPS, WAYS

ROOT = Path(__file__).parents[2]
ways = pytest.mark.parametrize("way", WAYS)


def torchrun(*arguments, processes=2, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *map(str, arguments)], cwd=ROOT, env=environment, **options)


LOGGED = ("loss", "gradient_norm", "largest_gradient_norm", "loss_by_t", "learning_rate")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Uninterrupted runs; and runs whose processes were killed past step 7, before and after they were resumed."""
    root = tmp_path_factory.mktemp("distributed")
    for name in ("straight", "resumed"):
        (root / name).mkdir()
    worker = "tests.training.distributed_worker"
    assert torchrun(worker, root / "straight", "straight").wait() == 0
    killed = torchrun(worker, root / "resumed", "killed", stderr=subprocess.PIPE, text=True)
    assert "SIGKILL" in killed.communicate()[1]
    shutil.copytree(root / "resumed", root / "killed")
    assert torchrun(worker, root / "resumed", "resumed").wait() == 0
    return root


def losses(folder, way):
    return json.loads((folder / f"{way}.json").read_text())


def tensors(folder):
    """Every file's tensors as bytes; the order of entries in a header does not matter."""
    read = {path.relative_to(folder): deserialize(path.read_bytes()) for path in folder.rglob("*.safetensors")}
    return {path: {name: bytes(entry["data"]) for name, entry in entries} for path, entries in read.items()}


@ways
def test_killed_and_resumed_is_the_same_run_bit_for_bit(folders, way):
    """Model, both moving averages and the optimiser, as each process wrote them."""
    straight = folders / "straight" / way / "checkpoints" / f"step-{STEPS}"
    assert tensors(straight) == tensors(folders / "resumed" / way / "checkpoints" / f"step-{STEPS}")
    assert (straight / "ema-0.5.safetensors").is_file()
    assert len(list(straight.glob("shards/*.safetensors"))) == (2 if WAYS[way].get("shard") else 0)
    assert losses(folders / "resumed", way) == losses(folders / "straight", way)[KILLED_AFTER:]
    log, other = (Run(folders / name / way).read_log() for name in ("resumed", "straight"))
    assert [entry["step"] for entry in log] == [5, 10, 15, 20]
    for mine, theirs in zip(log, other, strict=True):
        assert [mine[name] for name in LOGGED] == [theirs[name] for name in LOGGED]


@ways
def test_two_processes_train_what_one_trains(folders, way, tmp_path):
    """The global batch, its noise and its times are the same; only the order of sums differs."""
    alone = distributed_worker.alone(tmp_path, way)
    assert losses(folders / "straight", way) == pytest.approx(alone, rel=1e-4)
    mine, theirs = load(tmp_path / way).state_dict(), load(folders / "straight" / way).state_dict()
    for name, weight in mine.items():
        torch.testing.assert_close(theirs[name], weight, atol=2e-3, rtol=1e-2)
    log, other = Run(tmp_path / way).read_log(), Run(folders / "straight" / way).read_log()
    for mine, theirs in zip(log, other, strict=True):
        assert [loss or 0 for loss in theirs["loss_by_t"]] == pytest.approx(
            [loss or 0 for loss in mine["loss_by_t"]],
            rel=1e-3,  # None for a tenth of t without images
        )
        assert theirs["gradient_norm"] == pytest.approx(mine["gradient_norm"], rel=1e-3)
        assert mine["gradient_norm"] > distributed_worker.config(tmp_path, way).clip
    ours, theirs = (first_moments(folder / way, way) for folder in (tmp_path, folders / "straight"))
    for (name, moment), other in zip(ours.items(), theirs.values(), strict=True):
        torch.testing.assert_close(other, moment, atol=1e-2 * float(moment.abs().max()), rtol=1e-2, msg=name)


def first_moments(run, way):
    """AdamW's means of the clipped gradients, of everything that a run trains, from its shards or its one file."""
    config = replace(distributed_worker.config(run, way), shard=False)
    models = build_models(Job(config, Run(run), {}, Labels(10), VelocityLoss(config), [], ALONE))
    if "align" in WAYS[way]:
        models["projector"] = Projector(16, 112)
    named = {f"{file}.{n}": p for file in models if "ema" not in file for n, p in models[file].named_parameters()}
    optimizer = torch.optim.AdamW(named.values())
    assert load_training_state(run / "checkpoints" / f"step-{STEPS}", models, optimizer, ALONE) == STEPS
    return {name: optimizer.state[parameter]["exp_avg"] for name, parameter in named.items()}


@ways
def test_one_process_resumes_what_two_began(folders, way, tmp_path):
    shutil.copytree(folders / "killed" / way, tmp_path / way)
    if WAYS[way].get("shard"):  # the single process does not shard: this setting may change when a run is resumed
        assert (tmp_path / way / "checkpoints" / f"step-{KILLED_AFTER}" / "shards").is_dir()
    rest = distributed_worker.alone(tmp_path, way)
    assert rest == pytest.approx(losses(folders / "straight", way)[KILLED_AFTER:], rel=1e-4)


@pytest.mark.parametrize("processes", [3, 4])
def test_more_than_two_processes_resume_bit_for_bit(tmp_path, processes):
    """DDP orders gradients anew after its first backward pass, and three numbers have more than one sum."""
    assert torchrun("tests.training.distributed_worker", tmp_path, "again", processes=processes).wait() == 0
    for way in ("replicated", "sharded", "accumulated"):
        straight, resumed = (tmp_path / name / way for name in ("straight", "resumed"))
        last = f"checkpoints/step-{STEPS}"
        assert tensors(resumed / last) == tensors(straight / last), way
        losses = [[entry["loss"] for entry in Run(folder).read_log()] for folder in (straight, resumed)]
        assert losses[0] == losses[1]
        assert len(losses[0]) == STEPS


def test_two_processes_skip_what_one_of_them_cannot_use(tmp_path):
    """The same steps, also in a resumed run, and with the result of a single process that skips them."""
    assert torchrun("tests.training.distributed_worker", tmp_path, "skips").wait() == 0
    for way in ("replicated", "sharded", "accumulated"):
        straight, resumed = (tmp_path / name / way for name in ("straight", "resumed"))
        last = f"checkpoints/step-{STEPS}"
        assert tensors(resumed / last) == tensors(straight / last), way
        assert [entry["skipped"] for entry in Run(resumed).read_log()] == [1, 0, 1, 0]
        with distributed_worker.overflowing(3, KILLED_AFTER + 4):
            distributed_worker.alone(tmp_path / "alone", way, non_finite="skip")
        mine, theirs = load(tmp_path / "alone" / way).state_dict(), load(straight).state_dict()
        for name, weight in mine.items():
            torch.testing.assert_close(theirs[name], weight, atol=2e-3, rtol=1e-2)


def test_the_leading_process_decides_from_which_checkpoint_a_run_starts(tmp_path):
    assert torchrun("tests.training.distributed_worker", tmp_path, "starts").wait() == 0
    leaders, found = load(f"{tmp_path}/first/sharded@2").state_dict(), load(tmp_path / "second/sharded").state_dict()
    assert all(found[name].equal(weight) for name, weight in leaders.items())
    assert not all(found[name].equal(w) for name, w in load(f"{tmp_path}/first/sharded@1").state_dict().items())


def test_two_processes_distil_what_one_distils(tmp_path, monkeypatch):
    """Forward-mode derivatives and moments included; both processes hold the same student, bit for bit.
    Paths that are kept are followed by two processes first, and found by the one."""
    monkeypatch.setenv("PIXNERD_DATA", str(tmp_path / "data"))
    teacher = replace(distributed_worker.config(tmp_path, "replicated"), out=str(tmp_path / "teacher"), steps=5)
    list(train(teacher, torch.device("cpu")))
    assert torchrun("tests.training.distributed_worker", tmp_path, "students").wait() == 0
    for way in distributed_worker.STUDENTS:
        first, second = (torch.load(tmp_path / f"{way}-{rank}.pt") for rank in range(2))
        assert all(second[name].equal(weight) for name, weight in first.items()), way
        (tmp_path / "alone").mkdir(exist_ok=True)
        list(train(distributed_worker.student(tmp_path / "alone", way, tmp_path / "teacher"), torch.device("cpu")))
        mine, theirs = (Run(folder / way).read_log() for folder in (tmp_path / "alone", tmp_path))
        for one, other in zip(mine, theirs, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-3), way
            assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-2), way
        for name, weight in load(tmp_path / "alone" / way).state_dict().items():
            torch.testing.assert_close(first[name], weight, atol=2e-3, rtol=1e-2)


def test_a_picture_that_one_process_cannot_read_ends_fd_loss_in_all(tmp_path):
    """They share the work of reading the data before the first step, and must not wait for the one that gave up."""
    for number in range(130):
        place = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((16, 16), 40).convert("RGB").save(place)
    settings = distributed_worker.config(tmp_path, "replicated")
    settings = replace(settings, data=f"folder:{tmp_path / 'pictures'}", out=str(tmp_path / "teacher"), steps=1)
    list(train(settings, torch.device("cpu")))
    damaged = max((tmp_path / "pictures" / "b").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:200])
    flags = ["--teacher", tmp_path / "teacher", "--distil", "fd", "--steps", 1, "--out", tmp_path / "student"]
    trained = torchrun("pixnerd", "train", *flags, stderr=subprocess.PIPE, text=True)
    said = trained.communicate(timeout=120)[1]
    assert trained.returncode != 0
    assert f"pixnerd: {damaged} cannot be read as an image" in said


def test_the_leading_process_decides_which_checkpoint_is_resumed(tmp_path):
    """The processes list different newest checkpoints; later one of them cannot read the leader's."""
    assert torchrun("tests.training.distributed_worker", tmp_path, "listings", processes=3).wait() == 0
    sentence = "process 1 cannot read the checkpoint that process 0 found: step-2 is not here"
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == ["step-9", sentence]


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RANK": "0"}, "RANK=0 but no LOCAL_RANK, no WORLD_SIZE, no MASTER_ADDR, no MASTER_PORT: start .* torchrun"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2; ranks are 0 … WORLD_SIZE − 1"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK='first'; it has to be a whole number"),
    ],
)
def test_half_a_world_is_refused(monkeypatch, variables, sentence):
    if len(variables) > 1:
        variables = {"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", **variables}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=sentence):
        join()


def test_a_named_gpu_becomes_the_current_one(monkeypatch):
    """On which Triton's kernels run, whatever device their tensors are on."""
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    assert join(torch.device("cuda", 1)).device.index == 1
    join(torch.device("cuda"))
    join(torch.device("cpu"))
    assert used == [torch.device("cuda", 1)]


def test_sigterm_writes_a_checkpoint_and_exits_with_its_own_code(tmp_path):
    """0 would tell a scheduler that the run is finished; the same command resumes."""
    flags = ["--data", "synthetic", "--size", "nano/8", "--model.image-size", "16", "--batch-size", "4"]
    flags += ["--out", str(tmp_path / "run"), "--steps", "100000", "--log-every", "1", "--checkpoint-every", "100000"]
    command = [sys.executable, "-m", "pixnerd", "train", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while len(Run(tmp_path / "run").read_log()) < 3:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == STOPPED == 75
    step = int((tmp_path / "run/checkpoints/latest").read_text().removeprefix("step-"))
    assert f"stopped after step {step}, as requested" in out
    assert step == Run(tmp_path / "run").read_log()[-1]["step"]


def test_positions_cover_the_batch_once():
    worlds = [World(rank, 3, torch.device("cpu")) for rank in range(3)]
    assert [i for world in worlds for i in world.positions(12)] == list(range(12))


def test_an_uneven_division_is_refused(tmp_path):
    config = distributed_worker.config(tmp_path, "replicated")
    with pytest.raises(InputError, match="batch_size 8 cannot be shared evenly by 1 processes in 3 parts each"):
        train(replace(config, accumulate=3), torch.device("cpu"))
    with pytest.raises(InputError, match="shard is on, but this process is alone: start it with torchrun"):
        next(train(replace(config, shard=True), torch.device("cpu")))
