"""kill −9 at random moments, even while a checkpoint is written: no announced step is lost, nothing half-written read.

The training runs are children of one process that has already imported torch (python -m tests.training.test_killed):
each starts within milliseconds and can be killed like any other.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from pixnerd.checkpoints import newest_checkpoint
from pixnerd.runs import Run

KILLS = 20
STEPS = 480
EVERY = 3  # steps between checkpoints


def serve():
    """For each folder on stdin: train there in a new process; print its process id, its steps and how it ended."""
    import torch

    from pixnerd.training import train

    from .test_training import CPU, config_for

    torch.set_num_threads(1)  # a fork does not inherit a pool of threads
    for line in sys.stdin:
        config = config_for(line.strip(), steps=STEPS, checkpoint_every=EVERY, keep_checkpoints=2, log_every=10)
        pid = os.fork()
        if not pid:
            for record in train(config, CPU):
                print(f"step {record.step}", flush=True)
            os._exit(0)
        print(f"pid {pid}", flush=True)
        print(f"end {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}", flush=True)


def answers(server, last):
    """The server's next lines up to the first of word `last`, as (word, number)."""
    found = []
    for line in server.stdout:
        word, number = line.split()
        found.append((word, int(number)))
        if word == last:
            return found
    raise AssertionError(f"the training process ended; {last} was awaited")


def answer(server, word):
    return answers(server, word)[-1][1]


def start(server, folder):
    print(folder, file=server.stdin, flush=True)
    return answer(server, "pid")


def announced(folder):
    """The step that `latest` names, on which every reader may rely."""
    latest = folder / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("step-")) if latest.exists() else 0


def newest(folder):
    checkpoint = newest_checkpoint(folder / "checkpoints")
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


def logged_steps(folder):
    return [entry["step"] for entry in Run(folder).read_log()]


def half_written(folder):
    return list((folder / "checkpoints").glob(".partial-*"))


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


def final_files(folder):
    return {path.name: path.read_bytes() for path in (folder / "checkpoints" / f"step-{STEPS}").iterdir()}


def test_twenty_kills_lose_no_announced_step_and_change_nothing(tmp_path):
    command = [sys.executable, "-m", "tests.training.test_killed"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": Path(__file__).parents[2]}
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    moments, seen_half = random.Random(0), 0
    with subprocess.Popen(command, **pipes) as server:
        for kill in range(KILLS):
            kept = newest(killed)
            pid = start(server, killed)
            if kill % 4:  # every fourth one dies while it starts
                assert answer(server, "step") == kept + 1
            if kill % 2:
                stop_while_half_written(pid, killed)
            else:
                time.sleep(moments.uniform(0, 0.2))
            promised = announced(killed)
            os.kill(pid, signal.SIGKILL)
            *steps, (_, code) = answers(server, "end")
            assert code == -signal.SIGKILL, "it failed, or was done before it was killed: then STEPS is too small"
            seen_half += bool(half_written(killed))
            assert newest(killed) >= max([promised, *(step for _, step in steps if step % EVERY == 0)])
        for folder in (killed, straight):
            start(server, folder)
            assert answer(server, "end") == 0
        server.stdin.close()
    assert seen_half >= KILLS // 2  # otherwise half-written checkpoints were not tested
    assert final_files(killed) == final_files(straight)  # weights, averages and optimiser, bit for bit
    assert logged_steps(killed) == logged_steps(straight) == list(range(10, STEPS + 1, 10))
    assert not [path for path in (killed / "checkpoints").iterdir() if path.name.startswith(".")]


if __name__ == "__main__":
    serve()
