"""The walls of the house: which rooms may know which, and how large a room's files may be.

Imports are read off the syntax trees, those inside of functions and of `TYPE_CHECKING` included. The arrows
that are allowed are those of the table in docs/design.md.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "vllm_delta"

#: Rooms, the inner ones first.
ROOMS = (*("kernels/cpu", "kernels/gpu", "kernels", "integration", "calibration", "plain", "method", "cli"),)

#: Files that all of a room's neighbours may know.
SHARED_FILES = ("kernels/types", "kernels/limits")

#: Where vLLM may be imported.
KNOW_VLLM = ("integration/", "calibration/engine.py")

#: Files of more lines, and functions of more that are no kernels, are hard to hold in the head.
MOST_FILE_LINES, MOST_FUNCTION_LINES = 400, 60


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    """As in the rooms' names: ``kernels/gpu/ops``; a package's is its folder's."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("/__init__")


def room_of(name: str) -> str:
    return next((room for room in ROOMS if name == room or name.startswith(f"{room}/")), "")


@functools.cache
def imports(path: Path) -> tuple[set[str], set[str]]:
    """The package's own files that a file imports, by name, and the other modules."""
    own, others = set(), set()
    for node in ast.walk(tree_of(path)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by dots"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        for module in modules:
            if not module.startswith("vllm_delta"):
                others.add(module)
                continue
            parts = module.split(".")[1:]
            while parts and not is_module(parts):
                parts.pop()
            own.add("/".join(parts))
    return own, others


def is_module(parts: list[str]) -> bool:
    path = PACKAGE.joinpath(*parts)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def allowed_arrows() -> dict[str, set[str]]:
    """The table of docs/design.md: rooms, and the rooms and files that they may import."""
    text = (ROOT / "docs" / "design.md").read_text()
    table = text.split("| from | to |")[1].split("\n\n")[0]
    arrows: dict[str, set[str]] = {}
    for line in table.splitlines():
        cells = line.strip("| ").split(" | ")
        if len(cells) == 2 and "`" in cells[0]:
            targets = {name.removesuffix(".py") for name in re.findall("`([^`]+)`", cells[1])}
            for room in re.findall("`([^`]+)`", cells[0]):
                arrows[room] = targets
    return arrows


def test_every_room_is_in_the_table():
    assert set(allowed_arrows()) | {"method", "kernels"} == set(ROOMS)
    assert {room_of(name_of(path)) for path in files()} - {""} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_follow_the_arrows(room):
    allowed = allowed_arrows().get(room, set())
    for path in files():
        if room_of(name_of(path)) != room:
            continue
        for target in imports(path)[0]:
            inside = room_of(target) == room or target == ""
            shared = target in SHARED_FILES and "kernels" in allowed | {room.partition("/")[0]}
            above = room_of(target).partition("/")[0] in allowed or room_of(target) in allowed
            # The shared files of the kernels know the method alone.
            method = room == "kernels" and room_of(target) == "method"
            assert inside or shared or above or target in allowed or method, f"{path} imports {target}"


def test_kernels_of_the_platforms_are_strangers():
    for path in files():
        for one, other in (("kernels/cpu", "kernels/gpu"), ("kernels/gpu", "kernels/cpu")):
            if room_of(name_of(path)) == one:
                assert not [target for target in imports(path)[0] if room_of(target) == other], path
        for one, other in (("integration/cpu", "integration/cuda"), ("integration/cuda", "integration/cpu")):
            if name_of(path).startswith(one):
                assert not [target for target in imports(path)[0] if target.startswith(other)], path


def test_platforms_have_the_same_files():
    names = [
        {path.name for path in (PACKAGE / "integration" / name).glob("*.py")} for name in ("cpu", "cuda")
    ]
    assert names[0] == names[1]


def test_no_import_circles():
    graph = {name_of(path): imports(path)[0] for path in files()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name not in done:
            for target in graph.get(name, ()):
                if target != name:
                    visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_specification_is_not_used_at_run_time():
    users = [path for path in files() if "method/reference" in imports(path)[0]]
    assert not users


def test_who_knows_vllm():
    for path in files():
        of_vllm = [module for module in imports(path)[1] if module.split(".")[0] == "vllm"]
        known = path.relative_to(PACKAGE).as_posix().startswith(KNOW_VLLM)
        assert known or not of_vllm, f"{path} imports {of_vllm}"


def test_who_knows_triton():
    for path in files():
        if any(module.split(".")[0] == "triton" for module in imports(path)[1]):
            assert room_of(name_of(path)) == "kernels/gpu", path


def test_installing_imports_no_torch():
    """vLLM loads the entry points in every process, whether DELTA is used or not."""
    for name in ("__init__", "integration/__init__", "integration/names", "integration/plugin"):
        tree = tree_of(PACKAGE / f"{name}.py")
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in top:
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            assert module.split(".")[0] not in ("torch", "vllm"), name


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_files_and_functions_can_be_held_in_the_head():
    for path in files():
        assert len(path.read_text().splitlines()) <= MOST_FILE_LINES, path
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef) and not is_kernel(node):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= MOST_FUNCTION_LINES, f"{path}: {node.name} has {lines} lines"
