"""The command line in a separate process, so that a training run and the notebook watching it shut down cleanly."""

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .errors import InputError
from .signals import STOPPED

GRACE = 600  # seconds to exit after an interrupt: the largest model's checkpoint has 19 GB
TAIL = 20  # last lines of output that an error quotes
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class LaunchError(RuntimeError):
    """A command failed; the message has the command, how it ended and its last lines of output."""


def launch(arguments: Sequence[str], processes: int = 1, folder: Path | None = None) -> Iterator[str]:
    """Run `pixnerd ARGUMENTS`, in this folder or another one, and yield its output line by line; each update of a
    progress bar is a line.

    Several processes, one for each GPU of this machine, are started through `torchrun` below.

    Standard output and standard error come in the order in which they were written, without empty lines. The command
    starts when the first line is requested. When the iterator is closed, as an interrupted `for` loop does, the command
    is interrupted, so that a training run saves its state; after GRACE seconds it is killed. On Linux it also ends
    when the thread that requested the first line ends, even by a crash.

    Raises:
        InputError: while iterating: the command refused its input (exit code 2); the message is its sentence.
        LaunchError: while iterating: the command failed in any other way, or was stopped by a signal before its end.
    """
    several = ["-m", "pixnerd.launch", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    process = subprocess.Popen(
        [sys.executable, *several, "-m", "pixnerd", *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,  # a carriage return ends a line, too
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
        start_new_session=True,  # a notebook interrupts its process group, and a second interrupt would break the save
        preexec_fn=end_with_parent() if sys.platform == "linux" else None,
    )
    tail: deque[str] = deque(maxlen=TAIL)
    try:
        for line in process.stdout:
            if line := line.strip():
                tail.append(line)
                yield line
        code = process.wait()
    finally:
        _stop(process)
        process.stdout.close()
    if code == 2:
        raise InputError(sentence(tail))
    if code:
        command, lines = " ".join(["pixnerd", *arguments]), "\n  ".join(tail)
        raise LaunchError(f"`{command}` {ending(code)}; its last lines:\n  {lines}")


def torchrun() -> None:
    """torchrun as `pixnerd` needs it: `python -m pixnerd.launch --nproc-per-node=8 -m pixnerd train …`.

    It has torchrun's arguments. When it is told to stop, it gives the processes GRACE seconds for a checkpoint. It ends
    with their exit code, or with STOPPED after a signal, and prints no report of its own after their sentence.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
    logging.disable(logging.ERROR)
    try:
        main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException:
        sys.exit(STOPPED)


def end_with_parent() -> Callable[[], None]:
    """What a child runs between fork and exec, when only code that is already loaded may be used."""
    prctl, parent = ctypes.PyDLL(None).prctl, os.getpid()

    def prepare() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent died before the call
            os._exit(1)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's & makes children ignore it

    return prepare


def _stop(process: subprocess.Popen) -> None:
    """End a process, if it still runs, and everything that it started."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=GRACE)  # reads on: a full pipe would block it
    except subprocess.TimeoutExpired:
        pass
    finally:  # also after a second interrupt while waiting
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def sentence(tail: Sequence[str]) -> str:
    """The sentence of a command that refused its input, or the text in the frame that tyro prints for a wrong flag."""
    ours = [line.removeprefix("pixnerd: ") for line in tail if line.startswith("pixnerd: ")]
    return ours[-1] if ours else " ".join(line.strip("│ ") for line in tail if "──" not in line)


def ending(code: int) -> str:
    """How a process with this exit code ended, as the rest of a sentence."""
    if code == STOPPED:
        return "was stopped by a signal before its end, and resumes when it is given again"
    return f"ended with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"


if __name__ == "__main__":
    torchrun()
