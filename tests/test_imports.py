"""No import circles between files, and no words of an upper layer in a lower one."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from lowtide.runtime.backends.config import LoadConfig
from lowtide.runtime.options import SamplingParams

ROOT = Path(__file__).parent.parent
FOLDERS = ("models", "memory", "attention", "runtime", "cli")
PACKAGE = "lowtide"
PARAMETERS = {f.name for kind in (LoadConfig, SamplingParams) for f in dataclasses.fields(kind)}
COMMAND_LINE_ONLY = ("lowtide ", "--enforce")
"""Texts with these are read on the command line alone."""


def test_no_file_imports_itself_through_others() -> None:
    graph = import_graph()
    circles = [sorted(component) for component in components(graph) if len(component) > 1]
    assert not circles, "import circles:\n" + "\n".join(
        "  " + ", ".join(circle) for circle in sorted(circles)
    )


def test_no_message_below_the_command_line_writes_an_option_itself() -> None:
    """The same message is read by callers in Python, who write `memory`: use `option("memory")`."""
    written = {f"--{name.replace('_', '-')}" for name in PARAMETERS}
    for folder in FOLDERS[:-1]:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for line, text in literals(path):
                if any(words in text for words in COMMAND_LINE_ONLY):
                    continue
                assert not written & set(re.findall(r"--[a-z-]+", text)), (
                    f"{path}:{line} writes an option as the command line does: use "
                    f"lowtide.models.arguments.names.option in {text!r}"
                )


def literals(path: Path) -> list[tuple[int, str]]:
    """Return the texts of a module, docstrings aside, and joined where they stand together."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[tuple[int, str]] = []
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part for part in node.values if isinstance(part, ast.Constant)]
            inside |= {id(part) for part in parts}
            found.append((node.lineno, "\0".join(str(part.value) for part in parts)))
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docstrings | inside:
            found.append((node.lineno, node.value))
    return found


def import_graph() -> dict[str, set[str]]:
    """Return the files that each file of the product imports, by module name.

    Imports inside of functions and under `TYPE_CHECKING` count.
    """
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    modules = {module_name(path): path for path in [*paths, ROOT / "__init__.py"]}
    return {
        name: set(imports(path.read_text(encoding="utf-8"), modules)) - {name}
        for name, path in modules.items()
    }


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join((PACKAGE, *(part for part in parts if part != "__init__")))


def imports(source: str, modules: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in modules:
                    yield submodule
                elif node.module in modules:
                    yield node.module


def components(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the strongly connected components of the graph (Tarjan's algorithm)."""
    found: list[set[str]] = []
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], order[other])
        if lowest[name] == order[name]:
            position = stack.index(name)
            found.append(set(stack[position:]))
            del stack[position:]

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return found
