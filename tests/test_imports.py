"""No import circles between files, however and wherever a file imports another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("models", "memory", "attention", "runtime", "cli")
PACKAGE = "lowtide"


def test_no_file_imports_itself_through_others() -> None:
    graph = import_graph()
    circles = [sorted(component) for component in components(graph) if len(component) > 1]
    assert not circles, "import circles:\n" + "\n".join(
        "  " + ", ".join(circle) for circle in sorted(circles)
    )


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
