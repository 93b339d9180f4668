"""How many faults in the numerical core the tests notice: mutation testing with the operators of mutmut.

    .venv/bin/uv pip install --python .venv/bin/python mutmut
    OMP_NUM_THREADS=1 .venv/bin/python -m tests.measure.mutations [MODULE …] [--sample N] [--seed SEED] [--processes]

mutmut changes a module in one place (a − b becomes a + b, an argument is left out, …); whichever change no test
notices survives and is printed. Two operators are added: a statement that is left out, and a condition that is negated.
A module with more than N mutants is sampled. mutmut's own runner passes over decorated functions and over all that is
outside functions; this one does not.

Everything happens in a temporary copy of the files. First all tests of the chosen modules run unchanged, to see which
of them reach which line and how long they take, and once more in the order of their durations. Then each mutant runs
the tests that reach its line, the fastest first, up to the first failure, in a process that is forked from this one,
where torch is loaded already. A test that starts processes of its own reaches lines there that nobody counts: mutants
that no other test of their module reaches are counted as "elsewhere", or tried, with --processes, on the tests in
PROCESSES, which take minutes.

Left out: annotations, decorators, imports, docstrings, texts (strings with a space, all strings in a `raise`, and the
argument of the exception as a whole), and the calls in PASSED_OVER. Needs Linux.
"""

import argparse
import collections
import contextlib
import ctypes
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import coverage
import libcst as cst
import pytest
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_string

ROOT = Path(__file__).parents[2]
DATA = ("data/test_data.py", "data/test_pictures.py", "data/test_prepared.py")
TRAINING = ("training/test_training.py", "training/test_losses.py", "training/test_alignment.py")
TESTS = {  # module → the test files that mirror it
    "flow": ("test_flow.py", "training/test_losses.py"),
    "solvers": ("test_solvers.py", "test_sampling.py"),
    "sampling": ("test_sampling.py", "test_text.py", "test_fake_gpu.py"),
    "randomness": ("test_randomness.py", "test_sampling.py", "training/test_training.py"),
    "training/batches": (*TRAINING, "test_conditions.py"),
    "training/losses": TRAINING,
    "training/loop": (*TRAINING, "test_fake_gpu.py"),
    "training/meters": (*TRAINING, "test_cost.py"),
    "checkpoints": ("test_checkpoints.py", "test_model_source.py", "training/test_training.py"),
    "distributed": ("training/test_training.py", "test_fake_gpu.py"),
    "metrics/statistics": ("metrics/test_statistics.py", "metrics/test_text_to_image.py"),
    "data/dataset": DATA,
    "data/folder": DATA,
    "data/pictures": DATA,
    "data/prepared": DATA,
}
TOGETHER = ("test_leader_first.py", "training/test_distributed.py")
PROCESSES = {  # module → test files that run it in other processes
    "checkpoints": TOGETHER,
    "distributed": (*TOGETHER, "training/test_nodes.py"),
    "training/loop": ("training/test_distributed.py",),
}
# calls for display alone; those of which no mutant runs; names for annotations
PASSED_OVER = {"tqdm", "warn", "len", "isinstance", "TypeVar"}
PRELOADED = ("torch", "torchvision", "hypothesis.extra", "scipy.stats", "PIL.Image", "torch.utils.tensorboard")
PRELOADED += ("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.optim.swa_utils", "torch._dynamo")
MEMORY = 12 * 2**30  # bytes of address space: a mutant may allocate without end
SLACK = 30  # seconds on top of three times what the tests take


# --- mutants ---------------------------------------------------------------------------------------------------------


class Mutant(NamedTuple):
    original: cst.CSTNode
    mutated: cst.CSTNode
    lines: range  # of the statement's own code


def left_out(node: cst.SimpleStatementLine) -> Iterator[cst.CSTNode]:
    """f(x) → pass"""
    if len(node.body) == 1 and isinstance(node.body[0], cst.Expr) and isinstance(node.body[0].value, cst.Call):
        yield node.with_changes(body=[cst.Pass()])


def negated(node: cst.If | cst.While) -> Iterator[cst.CSTNode]:
    """if c → if not (c)"""
    test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    yield node.with_changes(test=cst.UnaryOperation(cst.Not(), test))


OPERATORS = [
    *((kind, operator) for kind, operator in mutation_operators if operator is not operator_string),
    (cst.SimpleStatementLine, left_out),
    (cst.If, negated),
    (cst.While, negated),
]


class Finder(cst.CSTVisitor):
    """Collects the mutants of a module."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Mutant] = []
        self.spans: list[range] = []  # of the statements around the current node
        self.raises: list[cst.Raise] = []  # those around it

    def on_visit(self, node: cst.CSTNode) -> bool:
        if self.passes_over(node):
            return False
        if isinstance(node, cst.Raise):
            self.raises.append(node)
        if isinstance(node, cst.SimpleStatementLine | cst.BaseCompoundStatement):
            place = self.get_metadata(PositionProvider, node)
            end = place.end.line
            if isinstance(node, cst.BaseCompoundStatement):  # only its head
                end = max(place.start.line, self.get_metadata(PositionProvider, node.body).start.line - 1)
            self.spans.append(range(place.start.line, end + 1))
        raised = any(node is statement.exc for statement in self.raises)  # the exception, whose arguments are its text
        for kind, operator in OPERATORS:
            if isinstance(node, kind) and not raised:
                self.found += [Mutant(node, mutated, self.spans[-1]) for mutated in operator(node)]
        if isinstance(node, cst.SimpleString) and not (self.raises or " " in node.value):
            self.found += [Mutant(node, mutated, self.spans[-1]) for mutated in list(operator_string(node))[:1]]
        return True

    def on_leave(self, node: cst.CSTNode) -> None:
        if self.passes_over(node):
            return
        if isinstance(node, cst.Raise):
            self.raises.pop()
        if isinstance(node, cst.SimpleStatementLine | cst.BaseCompoundStatement):
            self.spans.pop()

    def passes_over(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Call):
            name = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
            return isinstance(name, cst.Name) and name.value in PASSED_OVER
        if isinstance(node, cst.If):
            return isinstance(node.test, cst.Name) and node.test.value == "TYPE_CHECKING"
        docstring = isinstance(node, cst.Expr) and isinstance(node.value, cst.BaseString)
        return docstring or isinstance(node, cst.Annotation | cst.Decorator | cst.Import | cst.ImportFrom)


def mutants_of(code: str) -> tuple[cst.Module, list[Mutant]]:
    """A module's syntax tree, and its mutants."""
    wrapper, finder = MetadataWrapper(cst.parse_module(code)), Finder()
    wrapper.visit(finder)
    return wrapper.module, finder.found


def mutated_code(module: cst.Module, mutant: Mutant) -> str | None:
    """The module with the mutant in it; None if it is the same, or no Python."""
    code = module.deep_replace(mutant.original, mutant.mutated).code
    with contextlib.suppress(SyntaxError):
        compile(code, "mutant", "exec")
        return code if code != module.code else None
    return None


def described(before: str, after: str) -> str:
    """line: before → after, of the first line that a mutant changed."""
    pairs = enumerate(itertools.zip_longest(before.splitlines(), after.splitlines(), fillvalue=""), start=1)
    number, (old, new) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
    return f"{number}: {old.strip()} → {new.strip()}"


# --- tests -----------------------------------------------------------------------------------------------------------


class Recorder:
    """A plug-in of pytest that notes how long each test takes and which lines it reaches."""

    def __init__(self, files: list[str]) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.coverage = coverage.Coverage(data_file=None, include=files)
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.coverage.switch_context(item.nodeid)
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration

    def results(self) -> dict[str, Any]:
        self.coverage.stop()
        data = self.coverage.get_data()
        reached = {file: data.contexts_by_lineno(file) for file in data.measured_files()}
        return {"seconds": self.seconds, "reached": reached}


def forked(work: Callable[[], int], seconds: float, log: Path) -> int | None:
    """The exit status of work() in a process of its own; None if it takes too long. No process is left over."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            status = int(work())
        finally:
            os._exit(status)
    end, status = time.monotonic() + seconds, None
    while status is None and time.monotonic() < end:
        time.sleep(0.02)
        done, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if done else None
    for process in list(descendants(os.getpid())):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    return status


def descendants(process: int) -> Iterator[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            yield from descendants(int(child))
            yield int(child)


def run_tests(tests: Iterable[str], plugins: Iterable[Any] = ()) -> int:
    options = ["-x", "-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin", "--hypothesis-profile=mutants"]
    return pytest.main([*options, *tests], plugins=list(plugins))


def first_run(modules: list[str], folder: Path) -> dict[str, Any]:
    """Durations of all tests of these modules and the lines that they reach. Exits if one fails, in either order."""
    files = {file: None for module in modules for file in TESTS[module]}
    output, log = folder.parent / "first.json", folder.parent / "first.log"

    def in_order_of_files() -> int:
        recorder = Recorder([str(folder / "pixnerd" / f"{module}.py") for module in modules])
        status = run_tests((f"tests/{file}" for file in files), [recorder])
        output.write_text(json.dumps(recorder.results()))
        return status

    def fastest_first() -> int:
        return run_tests(tests_in(files, results))

    results: dict[str, Any] = {}
    for work in (in_order_of_files, fastest_first):
        if forked(work, 7200, log) != 0:
            sys.exit(f"{log.read_text()[-5000:]}\nunchanged, the tests fail")
        results = json.loads(output.read_text())
    return results


def tests_for(module: str, lines: range, first: dict[str, Any], path: Path) -> list[str]:
    """The tests that reach a mutant's lines, the fastest first."""
    reached = first["reached"].get(str(path), {})
    reaching = {test for line in lines for test in reached.get(str(line), ())}
    imported = "" in reaching  # as the module is imported: any test may depend on it
    return [test for test in tests_in(TESTS[module], first) if imported or test in reaching]


def tests_in(files: Iterable[str], first: dict[str, Any]) -> list[str]:
    """The tests in some files, the fastest first."""
    paths, seconds = {f"tests/{file}" for file in files}, first["seconds"]
    return sorted((test for test in seconds if test.split("::")[0] in paths), key=seconds.get)


# --- all together ----------------------------------------------------------------------------------------------------


def copy_of_files(folder: Path) -> None:
    """Copy what git tracks, or would, to `folder`."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    for name in filter(None, names.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def import_from(folder: Path) -> None:
    """Let this process and its children import the package and the tests from `folder`, and torch be loaded already."""
    os.chdir(folder)
    sys.path[0] = str(folder)
    for name in [name for name in sys.modules if name.split(".")[0] in ("pixnerd", "tests")]:
        del sys.modules[name]
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    import hypothesis

    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # the smallest failing example does not matter
    hypothesis.settings.register_profile("mutants", phases=phases, deadline=None, derandomize=True)
    for name in PRELOADED:
        __import__(name)
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans become children of this process


def try_mutants(module: str, folder: Path, first: dict[str, Any], asked: argparse.Namespace) -> str:
    """Run the mutants of a module, print those that survive, and return its line of the table."""
    path, log = folder / "pixnerd" / f"{module}.py", folder.parent / "mutant.log"
    code = path.read_text()
    tree, every = mutants_of(code)
    count = collections.Counter()
    for mutant in random.Random(asked.seed).sample(every, min(asked.sample, len(every))):
        changed = mutated_code(tree, mutant)
        if changed is None:
            continue
        tests = tests_for(module, mutant.lines, first, path)
        limit = 3 * sum(first["seconds"][test] for test in tests) + SLACK
        if not tests and module in PROCESSES:
            if not asked.processes:
                count["elsewhere"] += 1
                continue
            tests, limit = [f"tests/{file}" for file in PROCESSES[module]], 1800
        path.write_text(changed)
        os.utime(path, (count.total(), count.total()))  # no bytecode has this time
        status = forked(lambda tests=tests: run_tests(tests), limit, log) if tests else 0
        result = "killed" if status != 0 else "survived" if tests else "reached by no test"  # None: it took too long
        count[result] += 1
        if status == 0:
            print(f"{module}: {result}: {described(code, changed)}", flush=True)
    path.write_text(code)
    tried = count.total() - count["elsewhere"]
    return (
        f"| {module} | {len(every)} | {tried} | {count['killed']} | {tried - count['killed']} | {count['elsewhere']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=", ".join(TESTS))
    parser.add_argument("--sample", type=int, default=60, help="mutants of each module, at most")
    parser.add_argument("--seed", type=int, default=0, help="which mutants")
    parser.add_argument("--processes", action="store_true", help="also run the tests in PROCESSES")
    asked = parser.parse_args()
    modules = asked.modules or list(TESTS)
    if unknown := set(modules) - TESTS.keys():
        parser.error(f"no module is called {', '.join(unknown)}; there are {', '.join(TESTS)}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "copy"
        copy_of_files(folder)
        import_from(folder)
        begin = time.monotonic()
        first = first_run(modules, folder)
        print(f"{len(first['seconds'])} tests pass unchanged, {time.monotonic() - begin:.0f} s", flush=True)
        sys.dont_write_bytecode = True
        rows = ["| module | mutants | tried | killed | alive | elsewhere |", "|---|---|---|---|---|---|"]
        for module in modules:
            rows.append(try_mutants(module, folder, first, asked))
            print(f"{rows[-1]} {time.monotonic() - begin:.0f} s", flush=True)
        print("\n".join(rows))
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
