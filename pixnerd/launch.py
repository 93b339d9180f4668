"""The command line in a process of its own, so that a training and the notebook that watches it end well together."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from .errors import InputError

GRACE = 60  # seconds to end after an interrupt: the largest model's checkpoint has 19 GB
TAIL = 20  # lines of output that an error quotes
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class LaunchError(RuntimeError):
    """A command failed; the message has the command, how it ended, and its last lines."""


def launch(arguments: Sequence[str], processes: int = 1) -> Iterator[str]:
    """Run `pixnerd ARGUMENTS` and yield what it prints, line by line; each drawing of a progress bar is a line.

    In several processes, one for each GPU of this machine, it is torchrun that runs it.

    Output and errors come in the order in which they were written; empty lines are left out. Nothing starts before the
    first line is asked for. When the iterator is closed, which an interrupted `for` loop does, the command is
    interrupted, so that a training saves what it has, and after GRACE seconds it is killed. On Linux it also ends when
    the thread that asked for the first line does, be it by a crash.

    Raises:
        InputError: while iterating: the command refused its input (exit code 2); the message is its sentence.
        LaunchError: while iterating: it ended in any other way than well.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    spread = torchrun if processes > 1 else []
    process = subprocess.Popen(
        [sys.executable, *spread, "-m", "pixnerd", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,  # a carriage return ends a line, too
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
        start_new_session=True,  # a notebook's interrupt goes to its whole group, and a second one would break the save
        preexec_fn=_end_with_parent() if sys.platform == "linux" else None,
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
        raise InputError(_sentence(tail))
    if code:
        command, lines = " ".join(["pixnerd", *arguments]), "\n  ".join(tail)
        raise LaunchError(f"`{command}` {_ending(code)}; its last lines:\n  {lines}")


def _end_with_parent() -> Callable[[], None]:
    """What a child runs between fork and exec, where only what is loaded already may be used."""
    prctl, parent = ctypes.PyDLL(None).prctl, os.getpid()

    def prepare() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored behind a shell's &, which children inherit

    return prepare


def _stop(process: subprocess.Popen) -> None:
    """End a process that may still run, with all that it started."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=GRACE)  # a full pipe would keep it from ending
    except subprocess.TimeoutExpired:
        pass
    finally:  # a second interrupt ends the waiting
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _sentence(tail: Sequence[str]) -> str:
    """The sentence of a command that refused its input, or the words in the frame that is drawn for a wrong flag."""
    ours = [line.removeprefix("pixnerd: ") for line in tail if line.startswith("pixnerd: ")]
    return ours[-1] if ours else " ".join(line.strip("│ ") for line in tail if "──" not in line)


def _ending(code: int) -> str:
    return f"ended with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
