"""Sweeps: stopped and killed anywhere they go on to the same rows, each run is made once, and failures are kept."""

import concurrent.futures
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from pixnerd.errors import InputError, WriteError
from pixnerd.runs import SWEEP, Run
from pixnerd.signals import STOPPED
from pixnerd.studies import sweep as sweeping
from pixnerd.studies.record import rows_of
from pixnerd.studies.study import expand, read_study
from pixnerd.studies.sweep import carry_out, check_folders, status_of

from ..test_launch import wait_until
from .conftest import ROOT, TINY, sweep

LONGER = {"steps": 480, "checkpoint_every": 10}  # a second or more, wherever it runs
HEADS = {"head": TINY["axes"]["head"]}


def plan_of(path, out="runs/tiny"):
    return expand(read_study(path), Path(out))


def states(plan):
    return [status_of(run).state for run in plan]


def figures(plan):
    """The rows without what depends on the machine's speed."""
    rows = [dataclasses.replace(row, measures=dict(row.measures)) for row in rows_of(plan)]
    for row in rows:
        row.measures.pop("seconds_per_step")
    return rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The rows of four longer runs, two heads and two seeds, each made at one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"settings": TINY["settings"] | LONGER, "axes": HEADS}, sort_keys=False))
    study = read_study(path)
    plan = expand(study, folder / "runs")
    assert [carry_out(study, run).state for run in plan] == ["done"] * 4
    return figures(plan)


def start(*arguments):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "pixnerd", "sweep", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def steps_logged(run):
    log = Run(run.folder).read_log()
    return log[-1]["step"] if log else 0


def test_a_sweep_killed_in_the_middle_of_two_runs_goes_on_to_the_same_rows(study_file, undisturbed):
    """SIGKILL to all of its processes at once: no lock, no half-written file and no lost run is left."""
    path = study_file(settings=TINY["settings"] | LONGER, axes=HEADS)
    plan = plan_of(path)
    process = start(path, "--jobs", 2)
    wait_until(lambda: all(steps_logged(run) >= 15 for run in plan[:2]))
    everything = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for victim in reversed(everything):
        victim.kill()
    process.communicate()
    psutil.wait_procs(everything)
    assert states(plan) == ["stopped", "stopped", "missing", "missing"]
    assert sweep(path, "--jobs", 2) == 0
    assert states(plan) == ["done"] * 4
    assert figures(plan) == undisturbed
    steps = [entry["step"] for entry in Run(plan[0].folder).read_log()]
    assert steps == list(range(1, LONGER["steps"] + 1))


def test_halves_join_to_the_same_table(study_file, undisturbed, capfd):
    path = study_file(settings=TINY["settings"] | LONGER, axes=HEADS)
    plan = plan_of(path)
    assert sweep(path, "--index", 1, 3, "--jobs", 2) == 0
    assert "2 runs: 2 done" in capfd.readouterr().out
    assert states(plan) == ["missing", "done", "missing", "done"]
    assert sweep(path, "--index", 0) == 0
    assert sweep(path, "--index", 2) == 0
    assert figures(plan) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_run_and_each_saves(study_file, number):
    path = study_file(settings=TINY["settings"] | {"steps": 10**6, "checkpoint_every": 10**6}, axes=HEADS)
    plan = plan_of(path)
    process = start(path, "--jobs", 2)
    wait_until(lambda: all(steps_logged(run) >= 2 for run in plan[:2]))
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == STOPPED
    assert "4 runs: 2 stopped, 2 missing" in said
    assert not any(child.is_running() for child in children)
    assert states(plan) == ["stopped", "stopped", "missing", "missing"]
    for run in plan[:2]:
        assert (run.folder / "checkpoints/latest").read_text().strip() == f"step-{steps_logged(run)}"


def test_a_signal_while_measuring_ends_at_once_and_the_measuring_is_repeated(study_file, monkeypatch):
    path = study_file()
    study, run = read_study(path), plan_of(path)[0]
    measures = sys.modules.get("pixnerd.studies.measures") or __import__("pixnerd.studies.measures").studies.measures
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        with monkeypatch.context() as patch:
            patch.setattr(measures, "measure_run", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(SystemExit) as ended:
                carry_out(study, run)
        assert ended.value.code == STOPPED
        assert status_of(run).state == "stopped"
        assert carry_out(study, run).state == "done"
        assert [entry["step"] for entry in Run(run.folder).read_log()] == [1, 2, 3, 4]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_run_is_made_by_one_process_and_a_killed_one_lets_go(study_file, capsys):
    path = study_file()
    run = plan_of(path)[0]
    (run.folder / SWEEP).mkdir(parents=True)
    holding = "import filelock, sys, time\nlock = filelock.FileLock(sys.argv[1])\nlock.acquire()\n"
    holding += "print('held', flush=True)\ntime.sleep(600)"
    holder = subprocess.Popen(
        [sys.executable, "-c", holding, str(run.folder / SWEEP / "lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        assert status_of(run).state == "running"
        assert sweep(path, "--index", 0) == 0
        assert "0000-linear-v-seed-0: running" in capsys.readouterr().out
        assert not (run.folder / "config.json").exists()
    finally:
        holder.kill()
        holder.communicate()
    assert status_of(run).state == "missing"
    assert sweep(path, "--index", 0) == 0
    assert status_of(run).state == "done"


def test_looking_at_a_run_is_not_making_it(study_file):
    """Two that look at the same time hold the lock for a moment each."""
    run = plan_of(study_file())[0]
    (run.folder / SWEEP).mkdir(parents=True)
    (run.folder / SWEEP / "lock").touch()
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: status_of(run).state, range(2000)))
    assert set(found) == {"missing"}


NOWHERE = {"data": {"there": {}, "gone": {"data": "folder:/nowhere"}}}


def test_a_run_that_fails_says_why_once_and_the_others_go_on(study_file, capfd):
    path = study_file(axes=NOWHERE, seeds=[0])
    plan = plan_of(path)
    assert sweep(path) == 1
    printed = capfd.readouterr()
    (said,) = [line for line in printed.err.splitlines() if "nowhere" in line]
    assert said.startswith("0001-gone-seed-0 failed: folder /nowhere does not exist")
    assert "2 runs: 1 done, 1 failed" in printed.out
    assert states(plan) == ["done", "failed"]
    assert "folder /nowhere does not exist" in (plan[1].folder / SWEEP / "output.txt").read_text()


def test_a_failure_is_kept_until_retry(study_file, tmp_path, capsys, monkeypatch):
    path = study_file(axes=NOWHERE, seeds=[0])
    assert sweep(path, "--index", 1) == 2
    assert capsys.readouterr().err.startswith("pixnerd: folder /nowhere does not exist")
    assert sweep(path, "--index", 1) == 1
    assert "0001-gone-seed-0: failed: folder /nowhere does not exist" in capsys.readouterr().out
    monkeypatch.setattr(sweeping, "_make", lambda *_: None)
    assert sweep(path, "--index", 1, "--retry") == 0
    assert not (tmp_path / "runs/tiny/0001-gone-seed-0" / SWEEP / "failed.json").exists()


def test_a_full_disk_is_no_failure_of_the_run(study_file, capsys, monkeypatch):
    """What its sentence promises: the same command goes on."""
    path = study_file()
    run = plan_of(path)[0]

    def full(*_):
        raise WriteError("log.jsonl cannot be written (No space left on device): make room there")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", full)
        assert sweep(path, "--index", 0) == 2
    assert "make room there" in capsys.readouterr().err
    assert status_of(run).state == "stopped"
    assert sweep(path, "--index", 0) == 0


def test_a_mistake_of_ours_is_kept_too(study_file, monkeypatch):
    path = study_file()
    study, run = read_study(path), plan_of(path)[0]

    def broken(*_):
        raise KeyError("two\nlines")

    monkeypatch.setattr(sweeping, "_make", broken)
    with pytest.raises(KeyError):
        carry_out(study, run)
    assert status_of(run) == ("failed", r"KeyError: 'two\nlines'")


def test_list_says_how_far_each_run_is(study_file, capsys):
    path = study_file()
    plan = plan_of(path)
    for run, name, content in (
        (plan[0], "metrics.json", {"study": {}}),
        (plan[1], f"{SWEEP}/failed.json", {"why": "it broke"}),
        (plan[3], "metrics.json", {"evaluations": []}),
    ):
        (run.folder / SWEEP).mkdir(parents=True)
        (run.folder / SWEEP / "planned.json").write_text(json.dumps(planned(run, TINY["measure"])))
        (run.folder / name).write_text(json.dumps(content))
    assert sweep(path, "--list") == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert lines[:6] == [
        ["run", "state", "why"],
        ["0000-linear-v-seed-0", "done"],
        ["0001-linear-x-seed-0", "failed", "it broke"],
        ["0002-field-v-seed-0", "missing"],
        ["0003-field-x-seed-0", "stopped"],
        ["0004-linear-v-seed-5", "missing"],
    ]
    assert sweep(path, "--list", "--index", 1) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    (plan[0].folder / "metrics.json").write_text("{")
    assert status_of(plan[0]).state == "failed"
    assert "metrics.json cannot be read" in status_of(plan[0]).why


def planned(run, measure):
    return {"repeat": run.repeat, "choices": run.choices, "config": run.config.to_dict(), "measure": measure}


@pytest.fixture
def begun(study_file):
    """The tiny study, whose first run is planned."""
    path = study_file()
    run = plan_of(path)[0]
    (run.folder / SWEEP).mkdir(parents=True)
    (run.folder / SWEEP / "planned.json").write_text(json.dumps(planned(run, TINY["measure"])))
    return study_file


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"settings": TINY["settings"] | {"steps": 9}}, r"\(steps 4 there, 9 now\): restore the study"),
        ({"settings": TINY["settings"] | {"sampling.steps": 2}}, r"\(sampling.steps 1 there, 2 now\)"),
        ({"settings": TINY["settings"] | {"learning_rate": 0.5}}, r"\(learning_rate 0.004 there, 0.5 now\)"),
        ({"axes": dict(reversed(TINY["axes"].items()))}, "0000-linear-v-seed-0, which is none of the 8 runs of study"),
        ({"seeds": [1]}, "0000-linear-v-seed-0, which is none of the 4 runs"),
    ],
)
def test_a_study_that_changed_is_refused_before_any_work(begun, capsys, parts, sentence):
    path = begun(**parts)
    before = sorted(Path("runs").rglob("*"))
    for command in (["--index", 3], ["--list"], ["--record"], []):
        assert sweep(path, *command) == 2
        said = capsys.readouterr().err
        assert re.search(sentence, said), said
        assert said.count("\n") == 1
    assert sorted(Path("runs").rglob("*")) == before


def test_what_is_measured_may_change_until_it_is_measured(begun, capsys):
    path = begun(measure={"samples": 0, "errors": 5})
    assert sweep(path, "--list") == 0
    Run(plan_of(path)[0].folder).save_metrics({"study": {}})
    assert sweep(path, "--list") == 2
    assert "(measure.errors 4 there, 5 now)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"errors_on": "emoji:heldout"}, "'heldout' in data set 'emoji:heldout' is unknown"),
        ({"errors_on": "emoji"}, "the model knows 10 classes; the images of emoji have 7"),
        ({"samples": 16, "reference": "folder:/nowhere"}, "folder /nowhere does not exist"),
    ],
)
def test_what_cannot_be_measured_is_known_before_training_and_can_be_corrected(study_file, capsys, wrong, sentence):
    path = study_file(measure=TINY["measure"] | wrong)
    run = plan_of(path)[0]
    assert sweep(path, "--index", 0) == 2
    assert sentence in capsys.readouterr().err
    assert not (run.folder / "checkpoints").exists()
    assert sweep(study_file(), "--index", 0, "--retry") == 0
    assert status_of(run).state == "done"


def test_a_sweep_is_refused_under_torchrun(study_file, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sweep(study_file(), "--index", 0) == 2
    assert "WORLD_SIZE is 2; a sweep makes each run in one process" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_how_a_run_is_made_may_change(begun):
    path = begun(settings=TINY["settings"] | {"log_every": 3, "workers": 1})
    study = read_study(path)
    check_folders(study, plan_of(path), Path("runs/tiny"))


def test_a_planned_run_of_an_earlier_version_has_the_defaults(study_file):
    path = study_file()
    study, run = read_study(path), plan_of(path)[0]
    kept = planned(run, {"samples": 0, "errors": 4})
    del kept["config"]["cache_teacher"]
    (run.folder / SWEEP).mkdir(parents=True)
    file = run.folder / SWEEP / "planned.json"
    file.write_text(json.dumps(kept))
    check_folders(study, [run], Path("runs/tiny"))
    file.write_text('{"config": {}}')
    with pytest.raises(InputError, match="planned.json is damaged"):
        check_folders(study, [run], Path("runs/tiny"))


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("runs/tiny/0002-field-v-seed-0/config.json", "0002-field-v-seed-0 holds a run that no study planned"),
        ("runs/tiny/0099-field-v-seed-0/config.json", "0099-field-v-seed-0, which is none of the 8 runs"),
        ("runs/tiny/config.json", "runs/tiny holds a training run: name another folder"),
        ("runs/tiny", "runs/tiny cannot be written|Not a directory"),
    ],
)
def test_folders_from_elsewhere_are_refused(study_file, capsys, place, sentence):
    path = study_file()
    Path(place).parent.mkdir(parents=True)
    Path(place).write_text("{}")
    assert sweep(path, "--index", 0) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert Path(place).read_text() == "{}"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--index", 8], "index is 8; study tiny has the runs 0 … 7"),
        (["--index", -1], "index is (-1,); it cannot be negative"),
        (["--jobs", 0], "jobs is 0; it has to be at least 1"),
        (["--list", "--record"], "list, record and compare are three commands"),
        (["--index"], "index is empty; it takes the numbers of runs"),
        (["--list", "--index"], "index is empty"),
        (["--compare", ""], "study tiny has neither a run"),
        (["--compare", "head", "--by", "fd"], "by is fd; it goes with tune"),
        (["--record", "--index", 1], "index names runs to make or to list"),
        (["--record"], "no run of study tiny is done yet"),
        (["--against", "field"], "against is field; it goes with compare"),
        (["--tune", "head"], "tune is head; it goes with compare"),
        (["--compare", "head", "--tune", "head"], "tune is head; it goes with compare, and names another axis"),
        (["--compare", "head"], "study tiny has neither a run that is done in runs/tiny nor a record"),
    ],
)
def test_a_wrong_call_is_one_sentence(study_file, capsys, flags, sentence):
    assert sweep(study_file(), *flags) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not Path("runs").exists()


def test_processes_share_the_cores_unless_told_otherwise(study_file, monkeypatch):
    path = study_file()
    run = plan_of(path)[0]
    seen = []
    monkeypatch.setattr(sweeping.subprocess, "Popen", lambda command, **options: seen.append(options["env"]))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    monkeypatch.delenv("OMP_NUM_THREADS")
    sweeping._start(run, [], jobs=5)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    sweeping._start(run, [], jobs=100)
    assert [env["OMP_NUM_THREADS"] for env in seen] == ["2", "3"]


def test_listing_needs_no_torch():
    code = "import sys\nfrom pixnerd.cli import main\nmain(['sweep', 'notebooks/studies/rehearsal.yaml', '--list'])\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_models_are_measured_and_not_trained(study_file, capsys):
    trained = study_file()
    assert sweep(trained, "--index", 0) == 0
    model = plan_of(trained)[0].folder
    axes = {"guidance": {"none": {"sampling.guidance": 1.0}, "three": {"sampling.guidance": 3.0}}}
    parts = {"base": None, "settings": None, "seeds": None, "models": [str(model)]}
    path = study_file("guided", **parts, axes=axes)
    before = {file: file.stat().st_mtime_ns for file in model.rglob("*")}
    for index in (0, 1):
        assert sweep(path, "--index", index) == 0
    assert {file: file.stat().st_mtime_ns for file in model.rglob("*")} == before
    plan = plan_of(path, "runs/guided")
    assert states(plan) == ["done", "done"]
    sampled = [Run(run.folder).metrics()["study"]["sampling"]["guidance"] for run in plan]
    assert sampled == [1.0, 3.0]
    capsys.readouterr()
    assert sweep(path, "--compare", "guidance") == 0
    assert "three − none" in capsys.readouterr().out


def test_a_model_that_is_still_trained_is_not_measured(study_file, capsys):
    trained = study_file()
    assert sweep(trained, "--index", 0) == 0
    model = Run(plan_of(trained)[0].folder)
    longer = model.config().to_dict() | {"steps": 8}
    model.config_path.write_text(json.dumps(longer))
    parts = {"base": None, "settings": None, "seeds": None, "models": [str(model.folder)]}
    path = study_file("guided", **parts, axes={"guidance": {"one": {"sampling.guidance": 1.0}}})
    assert sweep(path, "--index", 0) == 2
    assert f"{model.folder} is at step 4 of 8: train it to its end" in capsys.readouterr().err
    assert states(plan_of(path, "runs/guided")) == ["failed"]


def test_the_recipe_for_submitit_goes_on_when_a_jobs_time_is_over(study_file, monkeypatch, undisturbed):
    """The page's code as it stands, but for the study; without Slurm submitit runs jobs on this machine."""
    submitit = pytest.importorskip("submitit")
    path = study_file(settings=TINY["settings"] | LONGER, axes=HEADS, seeds=[0])
    plan = plan_of(path)
    recipe = re.search(r"```python\n(.+?)```", (ROOT / "notebooks/studies.md").read_text(), re.DOTALL)[1]
    recipe = recipe.replace("notebooks/studies/rehearsal.yaml", str(path)).replace("range(4)", "range(1)")
    monkeypatch.setattr(submitit.local.local.LocalJob, "cancel", lambda *_, **__: None)  # at its deletion
    names = {"__name__": "__main__"}
    exec(recipe, names)
    (job,) = names["jobs"]
    wait_until(lambda: steps_logged(plan[0]) >= 15)
    task = next(child for child in psutil.Process(int(job.job_id)).children(recursive=True) if is_task(child))
    task.send_signal(signal.SIGUSR2)  # what Slurm sends before the time is over
    task.wait()
    assert status_of(plan[0]).state == "stopped"
    job.result()
    assert status_of(plan[0]).state == "done"
    assert figures(plan[:1]) == undisturbed[:1]
    assert [entry["step"] for entry in Run(plan[0].folder).read_log()] == list(range(1, LONGER["steps"] + 1))


def is_task(process):
    """Whether a process of submitit's is the one that does the work."""
    return any("submitit.core._submit" in part for part in process.cmdline())
