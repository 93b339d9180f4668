"""Training runs to be killed: children of one process that has already imported torch, so that each starts at once.

python -m tests.training.killed_worker reads requests, a JSON object each, see `Server.start`.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from safetensors import deserialize

from pixnerd.checkpoints import newest_checkpoint
from pixnerd.runs import Run
from pixnerd.signals import STOPPED

EVERY = 3  # steps between checkpoints
ENDLESS = 10**6  # steps of a run that is to be killed or stopped before its end, however late that comes


# --- in the server's process -----------------------------------------------------------------------------------------


def train_in_a_child(request, rank, group, port):
    """Fork one process of a training run: a program as torchrun starts it, in the process group of the first."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, group or 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup and a shell's & would have the run ignore them
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["ranks"] > 1:
        size = str(request["ranks"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = 1
    try:
        from pixnerd.cli import as_flags, main

        from .test_training import config_for

        main(["train", *as_flags(config_for(request["folder"], **request["settings"]))])
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        sys.stderr.flush()
        os._exit(code)


def serve():
    import torch
    import torch._dynamo  # what a run imports, before the forks
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.utils.tensorboard

    import pixnerd.cli
    import pixnerd.training.meters

    from . import test_training  # noqa: F401

    pixnerd.training.meters.matmul_rate = lambda *_: 1.0  # measuring a machine's best takes longer than all the steps
    torch.set_num_threads(1)  # a fork does not inherit a pool of threads
    sys.stdout = sys.stderr  # what the children print
    for line in sys.stdin:
        request = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = []
        for rank in range(request["ranks"]):
            pids.append(train_in_a_child(request, rank, pids[0] if pids else None, port))
        print(*pids, file=sys.__stdout__, flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(*codes, file=sys.__stdout__, flush=True)


# --- in the test's process -------------------------------------------------------------------------------------------


class Server:
    """Starts training runs, as a context manager. One at a time."""

    def __enter__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        command = [sys.executable, "-m", "tests.training.killed_worker"]
        self.process = subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes)
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def start(self, folder, ranks=1, **settings):
        """Train in a folder; the ids of the run's processes, whose group is that of the first."""
        request = {"folder": str(folder), "ranks": ranks, "settings": settings}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._numbers()

    def end(self):
        """The exit codes of the run's processes, once all have ended."""
        return self._numbers()

    def _numbers(self):
        line = self.process.stdout.readline()
        assert line, "the server has ended"
        return [int(word) for word in line.split()]


def announced(folder):
    """The step that `latest` names, on which every reader may rely."""
    latest = folder / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("step-")) if latest.exists() else 0


def newest(folder):
    checkpoint = newest_checkpoint(folder / "checkpoints")
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


def last_logged(folder):
    return max((entry["step"] for entry in Run(folder).read_log()), default=0)


def half_written(folder):
    return list((folder / "checkpoints").glob(".partial-*"))


def hidden(folder):
    return [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]


def final_tensors(folder, steps):
    """The bytes of every tensor of a checkpoint: weights, averages and optimiser."""
    found = {}
    for path in (folder / "checkpoints" / f"step-{steps}").rglob("*.safetensors"):
        found |= {(path.name, name): bytes(entry["data"]) for name, entry in deserialize(path.read_bytes())}
    return found


def wait_for(condition, pids):
    """Wait until the condition holds. It has to come true while the run goes on, however slow the machine is."""
    hang = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < hang, "it hangs"
        assert any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids), "it has ended"
        time.sleep(0.005)


def stop_while_half_written(pid, folder):
    """Suspend the process while it writes a checkpoint; if it finishes writing before the signal, try again."""
    process, leftovers = psutil.Process(pid), half_written(folder)
    is_writing = lambda: half_written(folder) not in ([], leftovers)
    hang = time.monotonic() + 300
    while time.monotonic() < hang:
        if is_writing():
            process.suspend()
            while process.status() != psutil.STATUS_STOPPED:
                pass
            if is_writing():
                return
            process.resume()
    raise AssertionError("no checkpoint was seen half-written")


def kill_again_and_again(server, folder, kills, ranks=1, **settings):
    """SIGKILL at random moments, every second one while a checkpoint is written; how many hit a half-written one, and
    the step that the run has reached.

    No step that `latest` has named may be lost. With several ranks one of them dies first, as where a machine fails.
    """
    moments, seen_half = random.Random(0), 0
    for kill in range(kills):
        kept = newest(folder) if folder.exists() else 0
        pids = server.start(folder, ranks, steps=ENDLESS, checkpoint_every=EVERY, log_every=1, **settings)
        if kill % 4:  # every fourth one dies while it starts
            wait_for(lambda kept=kept: last_logged(folder) > kept, pids)
        if kill % 2:
            stop_while_half_written(pids[0], folder)
        else:
            time.sleep(moments.uniform(0, 0.2))
        promised = announced(folder)
        os.kill(moments.choice(pids), signal.SIGKILL)
        os.killpg(pids[0], signal.SIGKILL)
        codes = server.end()
        assert codes == [-signal.SIGKILL] * ranks
        seen_half += bool(half_written(folder))
        assert newest(folder) >= promised
    return seen_half, newest(folder)


def stop_again_and_again(server, folder, signals, ranks=1, **settings):
    """Send each signal to all processes of the run, its loaders too, at a random moment: no completed step is lost.

    Returns the steps at which the run was stopped.
    """
    moments, stopped = random.Random(1), []
    for number in signals:
        kept = newest(folder) if folder.exists() else 0
        pids = server.start(folder, ranks, steps=ENDLESS, checkpoint_every=ENDLESS, log_every=1, **settings)
        wait_for(lambda kept=kept: last_logged(folder) > kept, pids)
        time.sleep(moments.uniform(0, 0.5))
        os.killpg(pids[0], number)
        assert server.end() == [STOPPED] * ranks
        assert newest(folder) == last_logged(folder) > kept
        assert not hidden(folder)
        stopped.append(newest(folder))
    return stopped


if __name__ == "__main__":
    serve()
