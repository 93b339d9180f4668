"""The files around the package agree with one another."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

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


# network ← flow, solvers ← sampling ← training ← command line: a module may import what stands before it
LAYERS = [
    {"errors", "randomness", "layers"},
    {"distributed"},
    {"fields"},
    {
        "model",
        "data",
        "data.captions",
        "data.dataset",
        "data.digits",
        "data.emoji",
        "data.folder",
        "data.imagenet",
        "data.prepared",
        "data.shapes",
        "data.synthetic",
    },
    {
        "text",
        "encoders",
        "flow",
        "metrics",
        "metrics.efficientnet",
        "metrics.nearest",
        "metrics.scenes",
        "metrics.statistics",
        "plots",
    },
    {"checkpoints", "losses"},
    {"metrics.benchmarks", "metrics.evaluation", "metrics.images", "metrics.inception", "metrics.networks"},
    {"alignment", "solvers", "runs", "throughput"},
    {"sampling"},
    {"training"},
    {"recipes"},
    {"cli", "launch", "explore", "explore.demo", "explore.explorer", "explore.lessons", "explore.parameters"},
    {"__main__"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}


@pytest.mark.parametrize("path", sorted((ROOT / "pixnerd").rglob("*.py")), ids=lambda path: path.stem)
def test_imports_point_one_way(path):
    module = ".".join(path.relative_to(ROOT / "pixnerd").with_suffix("").parts).removesuffix(".__init__")
    if module == "__init__":
        return
    package = module.split(".")[:-1] if path.stem != "__init__" else module.split(".")
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = [*package, ""][: len(package) + 1 - node.level]
        stem = ".".join([part for part in base if part] + ([node.module] if node.module else []))
        targets = [stem] if node.module else [alias.name for alias in node.names]
        for target in targets:
            same_package = target.split(".")[0] == module.split(".")[0]
            assert same_package or LEVEL[target] < LEVEL[module], f"{module} imports {target}"
