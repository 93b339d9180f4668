"""Carrying out a study: each run in a process of its own, several at a time, going on wherever it was stopped.

A run's folder has a folder `sweep` beside the files of the training run: planned.json, the run as it was planned;
made.json, with what it was made; failed.json, why it cannot be made; output.txt, what its process printed; and lock,
which a process holds while it makes the run. A run is done when its metrics.json has the study's row.
"""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import filelock
from tqdm import tqdm

from ..config import SamplingConfig, TrainConfig
from ..differences import differences
from ..errors import InputError, NonFiniteLoss, WriteError
from ..files import make_folder, read_json, write_atomically, writing
from ..launch import end_with_parent, ending, sentence
from ..runs import CHANGEABLE, SWEEP, Run
from ..signals import STOPPED, on_stop_signals
from .study import PlannedRun, Study
from .wanted import Measures

State = Literal["done", "running", "failed", "stopped", "recorded", "missing"]
RESULT = {"steps", *(f"sampling.{field.name}" for field in dataclasses.fields(SamplingConfig))}
HARMLESS = CHANGEABLE - RESULT  # settings that say how a run is made and not what comes out
LOOK = 1.0  # seconds within which a process that only looks whether a lock is held lets go of it
GLANCE = 0.25  # seconds that such a look itself waits for the lock; another look is over in far less
POLL = 0.1  # seconds between looks at the processes that make runs
REFRESH = 10.0  # seconds between updates of the time left, while no run ends


class Status(NamedTuple):
    """How far a run is."""

    state: State
    why: str = ""
    """the sentence of a run that failed"""


# --- what there is ---------------------------------------------------------------------------------------------------


def status_of(run: PlannedRun) -> Status:
    """How far a run is, from its folder."""
    kept = _kept_status(run)
    return kept if kept.state == "done" or not _is_held(run.folder / SWEEP / "lock") else Status("running")


def _kept_status(run: PlannedRun) -> Status:
    """How far a run is that no process makes."""
    notes = run.folder / SWEEP
    try:
        if "study" in Run(run.folder).metrics():
            return Status("done")
        if (notes / "failed.json").is_file():
            return Status("failed", str(read_json(notes / "failed.json", "a failure").get("why")))
    except InputError as error:
        return Status("failed", str(error))
    return Status("stopped" if (notes / "planned.json").is_file() else "missing")


def check_folders(study: Study, plan: Sequence[PlannedRun], out: Path) -> None:
    """Raise InputError unless all runs in `out` are those of the study as its file, and its recipe, are now."""
    if (out / "config.json").exists():
        raise InputError(f"{out} holds a training run: name another folder for the study with --out")
    known = {run.folder.name for run in plan}
    numbered = sorted(path.name for path in out.glob("*") if re.match(r"\d{4,}-", path.name))
    if strange := [name for name in numbered if name not in known]:
        raise InputError(
            f"{out} holds {strange[0]}, which is none of the {len(plan)} runs of study {study.name}: restore the study "
            "that it belongs to, or name another folder with --out"
        )
    for run in plan:
        planned = run.folder / SWEEP / "planned.json"
        if planned.is_file():
            _check_planned(study, run, read_json(planned, "a planned run"))
        elif any((run.folder / name).exists() for name in ("config.json", "metrics.json")):
            raise InputError(f"{run.folder} holds a run that no study planned: move it away, or name another --out")


def _check_planned(study: Study, run: PlannedRun, kept: dict[str, Any]) -> None:
    try:
        before = {study.repeat: kept["repeat"], "measure": dataclasses.asdict(Measures()) | kept["measure"]}
        config = TrainConfig.from_dict(kept["config"])  # settings newer than the file have their defaults
    except (KeyError, TypeError) as error:
        raise InputError(f"{run.folder / SWEEP / 'planned.json'} is damaged: {error!r}") from error
    now = {study.repeat: run.repeat, "measure": dataclasses.asdict(study.measure)}
    if before["measure"] != now["measure"] and _kept_status(run).state != "done":
        before["measure"] = now["measure"]  # nothing is measured yet: what to measure can still be corrected
    found = [d for d in differences(config, run.config) if d.name not in HARMLESS] + differences(before, now)
    if found:
        named = "; ".join(f"{d.name} {json.dumps(d.old)} there, {json.dumps(d.new)} now" for d in found)
        raise InputError(
            f"{run.folder} was made by study {study.name} when it was another one ({named}): restore the study, or "
            "name another folder with --out"
        )


# --- one run, in this process ----------------------------------------------------------------------------------------


def carry_out(study: Study, run: PlannedRun, retry: bool = False) -> Status:
    """Make a run, going on where it was stopped, unless it is done, another process makes it, or it failed before.

    A signal to stop ends the program with exit code STOPPED, after a checkpoint.

    Args:
        study: what the run belongs to.
        run: which to make.
        retry: make it even if it failed before.

    Raises:
        InputError, NonFiniteLoss: the run cannot be made, which is kept.
        WriteError: a file cannot be written; the next call goes on, without `retry`.
    """
    notes = run.folder / SWEEP
    make_folder(notes)
    with _holding(notes / "lock") as held:
        if not held:
            return Status("running")
        before = _kept_status(run)
        if before.state == "done" or (before.state == "failed" and not retry):
            return before
        planned = {"repeat": run.repeat, "choices": run.choices, "config": run.config.to_dict()}
        planned["measure"] = dataclasses.asdict(study.measure)
        write_atomically(notes / "planned.json", json.dumps(planned, indent=2) + "\n")
        (notes / "failed.json").unlink(missing_ok=True)
        try:
            _make(study, run)
        except WriteError:
            raise
        except Exception as error:
            known = isinstance(error, (InputError, NonFiniteLoss))
            why = str(error) if known else " ".join(f"{type(error).__name__}: {error}".split())
            write_atomically(notes / "failed.json", json.dumps({"why": why}) + "\n")
            raise
        return Status("done")


def _make(study: Study, run: PlannedRun) -> None:
    """Train to the end, then measure; in a study of models only measure."""
    on_stop_signals(_stop_now)
    from ..distributed import join
    from ..training.interruptible import train_until_stopped
    from .measures import check_measures, measure_run

    check_measures(run.config, study.measure)
    _note_surroundings(run.folder / SWEEP / "made.json")
    if run.model:
        _check_trained(Run(run.model))
        measure_run(Run(run.model), study.measure, run.config.sampling, into=Run(run.folder))
        return
    if train_until_stopped(run.config, join()) < run.config.steps:
        sys.exit(STOPPED)
    on_stop_signals(_stop_now)  # nothing is lost while measuring: the last step has its checkpoint
    measure_run(Run(run.folder), study.measure)


def _check_trained(model: Run) -> None:
    """Raise InputError unless a run has the checkpoint of its last step: figures from a run midway would stay."""
    from ..checkpoints import newest_checkpoint, step_of

    newest = newest_checkpoint(model.checkpoints)
    found, steps = step_of(newest) if newest else 0, model.config().steps
    if found < steps:
        raise InputError(
            f"{model.folder} is at step {found} of {steps}: train it to its end, then run this with --retry"
        )


def _stop_now(*_: object) -> None:
    sys.exit(STOPPED)


def _note_surroundings(path: Path) -> None:
    """Add to a file with what the run is made now, unless it stands there: it may go on elsewhere."""
    from ..surroundings import surroundings

    now = surroundings()
    before = read_json(path, "the surroundings of a run")["made"] if path.is_file() else []
    if now not in before:
        write_atomically(path, json.dumps({"made": [*before, now]}, indent=2) + "\n")


# --- the lock of a run -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _holding(path: Path) -> Iterator[bool]:
    """Hold a lock in the block, and yield whether it is held; False if another process holds it. It dies with us."""
    lock = filelock.FileLock(path)
    with writing(path), contextlib.suppress(filelock.Timeout):
        lock.acquire(timeout=LOOK)
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _is_held(path: Path) -> bool:
    if not path.is_file():
        return False
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=GLANCE, poll_interval=GLANCE / 25)
    except filelock.Timeout:
        return True
    except OSError:  # a folder that can only be read: nobody makes runs there
        return False
    lock.release()
    return False


# --- many runs, each in a process of its own -------------------------------------------------------------------------


@dataclass(frozen=True)
class Child:
    """A process that makes a run."""

    run: PlannedRun
    process: subprocess.Popen
    output: Path
    before: int
    """bytes that the output had before"""

    def said(self) -> str:
        """The sentence that it printed at its end, or how it ended."""
        with self.output.open("rb") as file:
            file.seek(self.before)
            lines = file.read().decode(errors="replace").splitlines()
        return (
            sentence(lines) if any(line.startswith("pixnerd: ") for line in lines) else ending(self.process.returncode)
        )


def check_alone() -> None:
    """Raise InputError under torchrun: each run of a study has a process of its own."""
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        error = InputError(
            f"WORLD_SIZE is {processes}; a sweep makes each run in one process: start it without torchrun, with --jobs"
        )
        error.shared = True
        raise error


def sweep(file: Path, plan: Sequence[PlannedRun], out: Path, jobs: int = 1, retry: bool = False) -> int:
    """Make runs in processes of their own, and say what came of them; returns the exit code of the command.

    A signal to stop is passed on to the processes, which then save.

    Args:
        file: the study's file.
        plan: which of its runs.
        out: the study's folder.
        jobs: how many at a time.
        retry: also those that failed before.

    Returns:
        0 if no run failed, 1 if one did, STOPPED if one was stopped.
    """
    ends = Counter()
    waiting = deque()
    for run in plan:
        found = status_of(run)
        if found.state == "failed" and not retry:
            _say(f"{run.folder.name} failed before: {found.why}")
            ends["failed"] += 1
        elif found.state == "running":
            ends["made by another process"] += 1
        elif found.state == "done":
            ends["done"] += 1
        else:
            waiting.append(run)
    asked: list[int] = []
    on_stop_signals(lambda number, _: asked.append(number))
    children: list[Child] = []
    told, shown = 0, time.monotonic()
    flags = ["--out", str(out), *["--retry"] * retry]
    with tqdm(total=len(waiting), unit="run", disable=not waiting) as bar:
        while children or (waiting and not asked):
            while told < len(asked):
                for child in children:
                    child.process.send_signal(asked[told])
                told += 1
            while waiting and not asked and len(children) < jobs:
                run = waiting.popleft()
                try:
                    children.append(_start(run, ["sweep", str(file), "--index", str(run.index), *flags], jobs))
                except WriteError as error:
                    _say(f"{run.folder.name} failed: {error}")
                    ends["failed"] += 1
                    bar.update()
            time.sleep(POLL)
            if time.monotonic() > shown + REFRESH:
                shown = time.monotonic()
                bar.refresh()
            for child in [child for child in children if child.process.poll() is not None]:
                children.remove(child)
                ends[_outcome(child, bool(asked))] += 1
                bar.update()
    ends["missing"] = len(waiting)
    if plan:
        print(f"{len(plan)} runs: {', '.join(f'{count} {end}' for end, count in ends.items() if count)}")
    return STOPPED if asked or ends["stopped"] else int(ends["failed"] > 0)


def _start(run: PlannedRun, arguments: list[str], jobs: int) -> Child:
    """Start a process for a run. Raises WriteError if its output cannot be kept."""
    output = run.folder / SWEEP / "output.txt"
    make_folder(output.parent)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {"OMP_NUM_THREADS": str(max(1, cores // jobs)), "PYTHONUNBUFFERED": "1"}
    with writing(output), output.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pixnerd", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=defaults | os.environ,
            start_new_session=True,  # Ctrl-C reaches it through us alone, or a second one would break its save
            preexec_fn=end_with_parent() if sys.platform == "linux" else None,
        )
        return Child(run, process, output, file.tell())


def _outcome(child: Child, asked: bool) -> str:
    """How a process ended, by what is in the run's folder; says why where it failed."""
    state, why = status_of(child.run)
    if state == "running":
        return "made by another process"
    if state == "done":
        return state
    if child.process.returncode == STOPPED or asked:
        return "stopped"
    _say(f"{child.run.folder.name} failed: {why or child.said()}")
    return "failed"


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
