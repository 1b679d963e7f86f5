"""Imports run one way: between the packages in the order of the house, and inside a package without a circle between folders."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BELOW: dict[str, set[str]] = {  # package -> the packages that it may import
    "kernels": set(),
    "convert": {"kernels"},
    "calib_data": {"convert", "kernels"},
    "engine": {"convert", "kernels"},
    "quant": {"engine", "calib_data", "convert", "kernels"},
    "serve": {"engine", "convert", "kernels"},
    "turbomind_quant": {"serve", "quant", "engine", "calib_data", "convert", "kernels"},
}


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports anywhere, but for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf8"))
    skipped = {
        part
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for part in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", BELOW)
def test_a_package_imports_only_those_below_it(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        found = {name.split(".")[0] for name in imported(path)} & {*BELOW, "scripts", "tests"}
        assert found <= BELOW[package] | {package}, path


@pytest.mark.parametrize("package", BELOW)
def test_no_circle_between_the_folders_of_a_package(package: str) -> None:
    """A file at the top of a package is a place of its own; a folder is one place with all that is below it."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }

    def place(module: str) -> str:
        return ".".join(module.split(".")[:2])

    graph: dict[str, set[str]] = {place(module): set() for module in files}
    for module, path in files.items():
        graph[place(module)] |= {place(name) for name in imported(path) if name in files} - {place(module)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_the_library_does_not_know_the_command_line() -> None:
    for path in (ROOT / "turbomind_quant" / "api").rglob("*.py"):
        names = set(imported(path))
        assert not any(name.startswith("turbomind_quant.cli") for name in names), path
        assert not names & {"click", "rich"}, path
