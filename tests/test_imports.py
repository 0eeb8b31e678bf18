"""Imports only go down the house, and no stage imports a stage."""

import ast
from pathlib import Path

from gemma2_post.stage import digests
from gemma2_post.stage.stages import STAGES

PACKAGE = Path("gemma2_post")
FLOORS = [
    ["cli"],
    ["selftest"],
    ["report", "chat", "export", "judge_check"],
    ["pipeline"],
    ["planning"],
    [*STAGES],
    ["training"],
    ["curation"],
    ["evaluation"],
    ["weights"],
    ["data"],
    ["models"],
    ["stage"],
]
"""The rooms from the top floor down; a room imports itself and the rooms of lower floors."""
TINY = {"tiny", "models", "stage"}
"""What the embedded world imports; nothing imports it."""


def allowed(room: str) -> set[str]:
    if room == "tiny":
        return TINY
    if room == "__init__":
        return set()
    (floor,) = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    return {room, *(other for rooms in FLOORS[floor + 1 :] for other in rooms)}


def test_every_room_imports_only_what_is_below_it() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert rooms == {"tiny", "__init__", *(room for floor in FLOORS for room in floor)}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module == "gemma2_post":
                names = [f"gemma2_post.{alias.name}" for alias in node.names]
            for name in names:
                if name.startswith("gemma2_post."):
                    assert name.split(".")[1] in allowed(room), f"{path} imports {name}"


def test_nothing_outside_the_tiny_world_knows_it() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] != "tiny":
            assert "gold" not in path.read_text(), path


def test_a_stage_depends_on_the_modules_that_its_code_imports() -> None:
    for path in PACKAGE.rglob("*.py"):
        names = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
        found = (
            PACKAGE.resolve().parent.joinpath(*name.split(".")) for name in names if name.startswith("gemma2_post")
        )
        expected = {
            each for base in found for each in (base.with_suffix(".py"), base / "__init__.py") if each.is_file()
        }
        assert set(digests.imported(path)) == expected, path
