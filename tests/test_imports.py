"""Who may import whom: stages import core and evaluation, core imports no room of ours, no stage imports a stage."""

import ast
from pathlib import Path

PACKAGE = Path("gemma2_post")
ALLOWED = {
    "core": {"core"},
    "evaluation": {"core", "evaluation"},
    "pipeline": {"core", "pipeline"},
    "tiny": {"core", "tiny"},
    "synthesize": {"core", "evaluation"},
    "sft": {"core", "evaluation"},
    "distill": {"core", "evaluation"},
    "reward": {"core", "evaluation"},
    "weights": {"core", "weights"},
    "rlhf": {"core", "evaluation", "weights"},
    "warp": {"core", "evaluation", "weights"},
    "evaluate": {"core", "evaluation"},
    "chat": {"core"},
    "cli": {"core", "pipeline", "chat"},
    "__init__": set(),
}


def test_every_room_imports_only_what_it_may() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert rooms == ALLOWED.keys()
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module == "gemma2_post":
                names = [f"gemma2_post.{alias.name}" for alias in node.names]
            for name in names:
                if name.startswith("gemma2_post."):
                    assert name.split(".")[1] in ALLOWED[room], f"{path} imports {name}"
