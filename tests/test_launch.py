"""launch() with scripts as commands: a folder's own `pixnerd` takes the place of the package."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pixnerd import InputError, launch
from pixnerd.runs import Run

ROOT = os.path.dirname(os.path.dirname(launch.__file__))


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Makes `python -m pixnerd` run a script with its arguments in sys.argv, after writing its process id to pid.txt.

    A process started in the folder finds this package before ours.
    """
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "pixnerd"
    package.mkdir()
    (package / "__init__.py").touch()

    def write(script):
        first = "import os, pathlib, signal, sys, time\npathlib.Path('pid.txt').write_text(str(os.getpid()))\n"
        (package / "__main__.py").write_text(first + script)
        return tmp_path / "pid.txt"

    return write


def is_running(pid):
    """Whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this should have happened by now"
        time.sleep(0.02)


def test_lines_come_in_order_and_as_they_are_written(command, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    command(
        "print('first', sys.argv[1:])\n"
        "print('second', file=sys.stderr)\n"
        "print('\\n', file=sys.stderr)\n"
        "sys.stderr.write('\\r 10% of α'); sys.stderr.write('\\r 20% of α\\n')\n"
        "end = time.monotonic() + 300\n"
        "while not os.path.exists('go'):\n"
        "    time.sleep(0.01 if time.monotonic() < end else sys.exit('nobody has read me'))\n"
        "print('last')"
    )
    lines = launch.launch(["train", "--out", "a b"])
    assert [next(lines) for _ in range(4)] == ["first ['train', '--out', 'a b']", "second", "10% of α", "20% of α"]
    open("go", "w").close()  # it waits for this file, so the lines so far were not buffered
    assert list(lines) == ["last"]


def test_a_command_that_fails_says_how(command):
    command("print('\\n'.join(map(str, range(100)))); sys.exit('it broke')")
    with pytest.raises(
        launch.LaunchError, match=r"(?s)`pixnerd train --steps 3` ended with exit code 1; .*99\n  it br"
    ):
        list(launch.launch(["train", "--steps", "3"]))
    command("os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(launch.LaunchError, match="was ended by SIGKILL"):
        list(launch.launch([]))


def test_input_that_is_refused_is_one_sentence(command):
    command("print('a warning'); print('pixnerd: steps is 0', file=sys.stderr); sys.exit(2)")
    lines = launch.launch([])
    assert next(lines) == "a warning"
    with pytest.raises(InputError, match="^steps is 0$"):
        list(lines)


def test_the_real_command_refuses_an_unknown_flag(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ROOT)
    with pytest.raises(InputError, match=r"^Unrecognized options: --colour, red For full[^│╭╰─]*$"):
        list(launch.launch(["train", "--colour", "red"]))


STUBBORN = "signal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('ready')\ntime.sleep(600)"
POLITE = """
try:
    print('ready')
    for _ in range(60_000):  # an interrupt between Python's last look and a single long sleep would wait for its end
        time.sleep(0.01)
except KeyboardInterrupt:
    print('x' * 1_000_000)  # more than a pipe holds
    pathlib.Path('saved').touch()
"""


def test_closing_interrupts_the_command_and_waits(command):
    pid = command(POLITE)
    for line in launch.launch([]):
        assert line == "ready"
        break
    wait_until(lambda: not is_running(pid.read_text()))
    assert os.path.exists("saved")


def test_an_interrupt_works_where_it_was_ignored(command):
    """As behind a shell's `&`: children inherit ignored signals."""
    command(POLITE)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        lines = launch.launch([])
        next(lines)
        lines.close()
    finally:
        signal.signal(signal.SIGINT, before)
    assert os.path.exists("saved")


def test_what_does_not_end_is_killed(command, monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.5)
    pid = command(STUBBORN)
    lines = launch.launch([])
    assert next(lines) == "ready"
    assert is_running(pid.read_text())
    lines.close()
    assert not is_running(pid.read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_a_killed_parent_ends_the_command(command):
    pid = command(STUBBORN)
    script = (
        f"import sys; sys.path[0] = {ROOT!r}\nfrom pixnerd.launch import launch\nfor line in launch([]): print(line)"
    )
    parent = subprocess.Popen([sys.executable, "-u", "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "ready\n"
    child = pid.read_text()
    assert is_running(child)
    parent.kill()
    parent.communicate()
    wait_until(lambda: not is_running(child))


TINY_TRAINING = ["--data", "synthetic", "--size", "nano/8", "--model.image-size", "16", "--batch-size", "4"]
TINY_TRAINING += ["--workers", "0", "--log-every", "1", "--checkpoint-every", "100000"]


def processes_with(words):
    """The ids of the processes whose command line contains these words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if words in path.read_text(errors="replace"):
                found.append(path.parent.name)
    return {process for process in found if is_running(process)}


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_two_processes_train_together(tmp_path, one_thread):
    out = str(tmp_path / "run")
    lines = list(launch.launch(["train", "--out", out, "--steps", "3", *TINY_TRAINING], processes=2))
    assert sum(line.startswith("trained: ") for line in lines) == 1  # only one of the two prints
    assert [entry["step"] for entry in Run(out).read_log()] == [1, 2, 3]
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == "step-3"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--data", "folder:/nowhere"], "^folder /nowhere does not exist; [^\n]*$"),  # found by every process
        (["--steps", "0"], "^steps is 0; it has to be at least 1$"),  # found before the processes know of one another
        (["--start-from", "/nowhere"], "^/nowhere does not exist and holds no run; [^\n]*$"),
    ],
)
def test_two_processes_refuse_as_one_does(tmp_path, one_thread, flags, sentence):
    arguments = ["train", "--out", str(tmp_path / "run"), *TINY_TRAINING, *flags]
    lines = []
    with pytest.raises(InputError, match=sentence):
        lines.extend(launch.launch(arguments, processes=2))
    assert sum(line.startswith("pixnerd: ") for line in lines) == 1
    assert not any("Traceback" in line for line in lines)
    assert not (tmp_path / "run").exists()


def test_two_processes_with_loaders_save_when_their_launcher_is_told_to_stop(tmp_path, one_thread):
    """torchrun signals everything that it started, the loaders too."""
    out = str(tmp_path / "run")
    flags = ["train", "--out", out, "--steps", "1000000", *TINY_TRAINING, "--workers", "2"]
    command = [sys.executable, "-m", "pixnerd.launch", "--standalone", "--nproc-per-node=2", "-m", "pixnerd", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    wait_until(lambda: len(Run(out).read_log()) >= 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=600)
    assert process.returncode == launch.STOPPED
    last = Run(out).read_log()[-1]["step"]
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == f"step-{last}"


def test_a_run_that_was_stopped_is_an_error(command):
    command(f"print('stopped after step 3'); sys.exit({launch.STOPPED})")
    with pytest.raises(launch.LaunchError, match="`pixnerd train` was stopped by a signal before its end, and resumes"):
        list(launch.launch(["train"]))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_a_killed_parent_leaves_no_worker_behind(tmp_path, one_thread):
    """Not even one that only torchrun knows."""
    out = str(tmp_path / "run")
    arguments = ["train", "--out", out, "--steps", "1000000", *TINY_TRAINING]
    script = f"from pixnerd.launch import launch\nfor line in launch({arguments!r}, processes=2): pass"
    script = f"import sys; sys.path[0] = {ROOT!r}\n{script}"
    parent = subprocess.Popen([sys.executable, "-c", script])
    try:
        wait_until(lambda: len(Run(out).read_log()) >= 2)
        assert len(processes_with(out)) == 4  # the parent, torchrun, its two workers
        parent.kill()
        parent.wait()
        wait_until(lambda: not processes_with(out))
    finally:
        for process in processes_with(out):
            os.kill(int(process), signal.SIGKILL)
