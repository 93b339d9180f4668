"""The files around the package are consistent."""

import ast
import graphlib
import importlib
import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from pixnerd import data, frozen

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()


def name_of(requirement):
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


def test_environment_installs_this_package_with_every_extra():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"]
    assert f"python{PROJECT['requires-python']}" in environment["dependencies"]
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == [f"-e .[{','.join(PROJECT['optional-dependencies'])}]"]


def test_lock_pins_every_requirement_with_hashes_and_names_no_registry():
    wanted = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    for requirement in wanted:
        assert re.search(rf"^{name_of(requirement)}==", LOCK, re.MULTILINE), requirement
    assert "://" not in LOCK
    pins = re.split(r"\n(?=\w)", LOCK[re.search(r"^\w", LOCK, re.MULTILINE).start() :])
    assert all("--hash=sha256:" in pin for pin in pins)
    major, minor = map(int, re.search(r"^torch==(\d+)\.(\d+)", LOCK, re.MULTILINE).groups())
    assert (major, minor) >= (2, 15)


def test_ci_runs_the_readmes_test_command():
    assert "make test" in (ROOT / "README.md").read_text()
    assert re.search(r"^make test$", (ROOT / ".ci/run").read_text(), re.MULTILINE)


# --- imports point one way -----------------------------------------------------------------------------------------


def floors():
    """From the diagram in README: top-level modules and folders of the package → number of their floor, 0 on top."""
    section = (ROOT / "README.md").read_text().split("## The floors")[1]
    drawing = re.search(r"```\n(.+?)```", section, re.DOTALL)[1]
    lines = [re.sub(r"^\w+(?=  )", "", line).split() for line in drawing.splitlines()]
    return {name.rstrip("/"): number for number, names in enumerate(lines) for name in names}


def modules():
    """Every module of the package, by its dotted name."""
    paths = sorted((ROOT / "pixnerd").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT / "pixnerd").with_suffix("").parts) for path in paths]
    return {name.removesuffix("__init__").rstrip("."): path for name, path in zip(names, paths, strict=True)}


def imports(module, path, known):
    """The package's modules that a module imports anywhere in its file, except for type checking."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = [part for part in package if part]
    found, tree = set(), ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) + 1 - node.level] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                found.add(inner if inner in known else ".".join(base))
    return found - {module}


MODULES = modules()
IMPORTS = {module: imports(module, path, MODULES) for module, path in MODULES.items()}


def test_the_diagram_has_every_module_once_and_no_other():
    assert floors().keys() == {name.split(".")[0] for name in MODULES} - {""}


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_a_module_imports_only_from_lower_floors_and_its_own_folder(module):
    level, own = floors(), module.split(".")[0]
    for target in IMPORTS[module]:
        other = target.split(".")[0]
        assert other == own or level[other] > level[own], f"{module} imports {target}"


def test_no_module_imports_itself_through_others():
    graphlib.TopologicalSorter(IMPORTS).prepare()  # raises CycleError with the cycle


def test_a_wrong_import_is_noticed(tmp_path):
    """`imports` sees every form: relative, of a module or a name, inside a function."""
    path = tmp_path / "loop.py"
    path.write_text("from .. import cli\nfrom ..data.pictures import SUFFIXES\ndef f():\n    from ..runs import Run\n")
    assert imports("training.loop", path, MODULES) == {"cli", "data.pictures", "runs"}


# --- imports are fast ------------------------------------------------------------------------------------------------


def loaded(*command):
    """The top-level modules that a fresh Python has imported after running these lines."""
    code = "import atexit, sys; atexit.register(lambda: print('LOADED', *sorted(sys.modules)))\n" + "\n".join(command)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return set(done.stdout.rsplit("LOADED ", 1)[1].split())


HEAVY = {"torchvision", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.tensor", "tensorboard"}
HEAVY |= {"matplotlib", "transformers", "scipy", "sklearn", "tqdm.notebook"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *(
            [command, "--help"]
            for command in ("train", "sample", "evaluate", "convert", "data", "prepare", "bench", "sweep")
        ),
        ["export-explorer", "--help"],
        ["export-explorer", "page.txt"],
        ["train", "--stepz", "3"],
        ["train", "--steps", "0"],
        ["train", "--recipe", "magic"],
        ["sample", "/nowhere", "--steps", "0"],
    ],
    ids=" ".join,
)
def test_help_and_a_refused_flag_do_not_need_torch(arguments):
    found = loaded("from pixnerd.cli import main", f"main({arguments!r})")
    assert not {"torch", "torchvision", "matplotlib", "transformers"} & found


def test_the_package_alone_imports_nothing_heavy():
    assert "torch" not in loaded("import pixnerd")
    public = (
        "PixNerd",
        "TextPixNerd",
        "SIZES",
        "load",
        "load_released",
        "sample",
        "sampling",
        "training",
        "InputError",
    )
    found = loaded("import pixnerd", *(f"pixnerd.{name}" for name in public))
    assert "torch" in found
    alone = loaded("import torch, torch.utils.flop_counter, torch.optim.swa_utils")
    assert not (HEAVY - alone) & found


# --- names agree -----------------------------------------------------------------------------------------------------


def test_the_book_lists_every_name_of_a_data_set():
    page = (ROOT / "notebooks" / "command_line.md").read_text()
    for form in data.NAMES.split(", "):
        assert f"`{form}" in page, f"notebooks/command_line.md does not have {form}"


def test_every_data_set_and_frozen_network_has_its_file():
    for package, entries in (
        ("data", [source.opener for source in data.DATA_SETS.values()]),
        ("frozen", frozen.IMAGE_NETWORKS.values()),
    ):
        for entry in entries:
            module, name = entry.split(".")
            assert hasattr(importlib.import_module(f"pixnerd.{package}.{module}"), name)


@pytest.mark.parametrize(
    ("own", "spin"),
    [
        ({}, "700 1"),
        ({"GOMP_SPINCOUNT": "7"}, "7 1"),
        ({"KMP_BLOCKTIME": "200"}, "700 200"),
        ({"OMP_WAIT_POLICY": "active"}, "None None"),
    ],
    ids=["default", "own spin", "own block time", "own policy"],
)
def test_threads_spin_shortly_unless_the_user_decides(own, spin):
    environment = {name: value for name, value in os.environ.items() if not re.match("GOMP_|OMP_|KMP_", name)} | own
    code = "import pixnerd, os; print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('KMP_BLOCKTIME'))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == spin
    rule = "spin: ; @echo $${GOMP_SPINCOUNT:-None} $${KMP_BLOCKTIME:-None}"
    done = subprocess.run(
        ["make", "--no-print-directory", "--eval", rule, "spin"],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == spin


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc's malloc")
@pytest.mark.parametrize(
    ("own", "kept"), [({}, True), ({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}, False)], ids=["default", "own"]
)
def test_freed_memory_is_used_again_unless_the_user_decides(own, kept):
    environment = {n: v for n, v in os.environ.items() if not n.startswith("MALLOC_") and n != "GLIBC_TUNABLES"} | own
    code = """if True:
        import ctypes, resource
        import pixnerd
        libc, size = ctypes.CDLL(None), 64 << 20
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        def use():
            block = libc.malloc(size)
            libc.memset(block, 1, size)
            libc.free(block)
        use()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            use()
        print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / (4 * size))"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    new_pages = float(done.stdout)  # as a share of the four blocks
    assert new_pages < 0.05 if kept else new_pages > 0.9
