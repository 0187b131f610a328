"""Imports go one way: no circles, and no room imports one above it."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the bottom up: a module imports from its own room and from rooms before it.
ROOMS = (
    (
        "s2kernels.plan",
        "s2kernels.groups",
        "s2kernels.update",
        "s2kernels.sparse",
        "s2kernels.grouped",
        "s2kernels.reference",
    ),
    ("s2kernels.kernels",),
    ("s2kernels.backend",),
    ("s2kernels.autograd",),
    ("s2kernels",),  # the core: every module that is in no other room
    ("s2kernels.peft.host",),
    ("s2kernels.peft.s2ft", "s2kernels.peft.spiel"),
    ("s2kernels.peft",),
    ("s2kernels.serve",),
    ("s2kernels.vllm",),
    ("s2kernels.cli",),
)
# Rooms on one level that do not know each other.
APART = (
    ("s2kernels.peft.s2ft", "s2kernels.peft.spiel"),
    ("s2kernels.serve", "s2kernels.peft.s2ft"),
)


def modules() -> dict[str, Path]:
    """Every module of the package by name; autograd lies beside it and is linked into it."""
    found = {}
    for folder, name in (
        (ROOT / "s2kernels", "s2kernels"),
        (ROOT / "autograd", "s2kernels.autograd"),
    ):
        for path in folder.rglob("*.py"):
            inside = path.relative_to(folder)
            if inside.parts[0] == "autograd":
                continue
            parts = [name, *inside.with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, also under TYPE_CHECKING and in functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:  # a module of a package, or what a module defines
                module = f"{node.module}.{alias.name}"
                names.add(module if module in MODULES else node.module)
    return names & MODULES.keys()


def level(module: str) -> int:
    """The room of a module, by its longest prefix."""
    found = [
        (len(prefix), i)
        for i, prefixes in enumerate(ROOMS)
        for prefix in prefixes
        if module == prefix or module.startswith(f"{prefix}.")
    ]
    return max(found)[1]


def test_there_is_no_circle():
    """graphlib raises CycleError, which names the modules of one."""
    TopologicalSorter({name: imported(path) for name, path in MODULES.items()}).prepare()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_room_imports_one_above_it(name):
    above = {other for other in imported(MODULES[name]) if level(other) > level(name)}
    if name in ("s2kernels", "s2kernels.__main__"):  # they gather what users call
        above = set()
    assert not above, f"{name} imports {sorted(above)}"


@pytest.mark.parametrize(("left", "right"), APART)
def test_rooms_beside_each_other_stay_apart(left, right):
    for name, path in MODULES.items():
        for own, other in ((left, right), (right, left)):
            if name.startswith(f"{own}."):
                assert not [each for each in imported(path) if each.startswith(f"{other}.")], name
