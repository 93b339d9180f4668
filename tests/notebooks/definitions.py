"""Which classes and functions the lessons define: each in one lesson, and the package's own names with a proof.

A lesson may define anew, in plain form, what the package has, if one of its cells tagged `parity` holds both together:
it names the lesson's `name` and the package's `module.name`, and asserts.
"""

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat

from .notebook_files import ROOT, tags


def top_level(source: str) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.parse(source).body if isinstance(node, kinds)}


def package_names(package: Path = ROOT / "pixnerd") -> set[str]:
    found = set().union(*(top_level(path.read_text()) for path in package.rglob("*.py")))
    return {name for name in found if not name.startswith("_")}


def proved(name: str, cells: Sequence[nbformat.NotebookNode]) -> bool:
    """Whether a parity cell compares the lesson's with the package's and can fail."""
    for cell in cells:
        if "parity" in tags(cell):
            nodes = list(ast.walk(ast.parse(cell.source)))
            ours = any(isinstance(node, ast.Name) and node.id == name for node in nodes)
            theirs = any(isinstance(node, ast.Attribute) and node.attr == name for node in nodes)
            if ours and theirs and ("assert " in cell.source or "assert_close(" in cell.source):
                return True
    return False


def definition_faults(lessons: Mapping[str, Sequence[nbformat.NotebookNode]]) -> list[str]:
    """Sentences about the code cells of the lessons, by lesson."""
    faults, where, package = [], {}, package_names()
    for lesson, cells in lessons.items():
        for name in sorted(set().union(*(top_level(cell.source) for cell in cells))):
            if name in where:
                faults.append(f"{name} is defined in {where[name]} and in {lesson}")
            where.setdefault(name, lesson)
            if name in package and not proved(name, cells):
                faults.append(f"{name} is a name of the package: {lesson} needs a parity cell for it")
    return faults
