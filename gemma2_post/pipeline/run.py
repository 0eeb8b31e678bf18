"""Runs the stages of a pipeline recipe, each as its own `accelerate launch`; skips those that are up to date.

Nothing here imports torch: with everything up to date the answer comes at once.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gemma2_post.core import contract, recipe
from gemma2_post.core.errors import EXIT_STATUS_FILE, UserError


@dataclass
class StageEntry:
    recipe: str
    """A file beside the pipeline recipe."""
    launch: str | None = None
    """Its accelerate config; without it, the pipeline's."""
    model: str | None = None
    """The earlier stage whose output is its model; without it, the recipe's model_name_or_path."""
    policies: list[str] | None = None
    """The earlier stages whose outputs are its policies; without it, the recipe's policies."""
    reward_model: str | None = None
    """The earlier stage whose output is its reward model; without it, the recipe's reward_model."""
    num_policies: int | None = None
    """How often it runs, as policy 0, 1, ...; each writes a folder of its own."""


@dataclass
class Pipeline:
    run_dir: str
    launch: str
    stages: dict[str, dict]


def load_pipeline(path: Path) -> tuple[Pipeline, dict[str, StageEntry]]:
    (pipeline,) = recipe.build(str(path), recipe.load_yaml(path), [Pipeline], {})
    entries = {
        name: recipe.build(f"{path}: {name}", entry, [StageEntry], {})[0] for name, entry in pipeline.stages.items()
    }
    names = list(entries)
    for i, (name, entry) in enumerate(entries.items()):
        earlier = names[:i]
        named = [("model", entry.model), ("reward_model", entry.reward_model)]
        named += [("policies", policy) for policy in entry.policies or []]
        for key, value in named:
            if value is not None and value not in earlier:
                raise UserError(
                    f"{path}: {name}: {key} names {value}, which is no earlier stage ({', '.join(earlier) or 'none'})"
                )
    return pipeline, entries


def run(path: Path, until: str | None, overrides: dict[str, dict[str, object]]) -> None:
    """Runs the stages in order, up to and including `until`.

    Args:
        overrides: stage name to recipe keys that take the place of the recipe's.
    """
    pipeline, entries = load_pipeline(path)
    for name in [*([until] if until else []), *overrides]:
        if name not in entries:
            raise UserError(f"{path}: there is no stage {name}; it has {', '.join(entries)}")
    run_dir = Path(pipeline.run_dir)
    for name, entry in entries.items():
        overrides_here = _references(entry, run_dir) | overrides.get(name, {}) | {"output_dir": str(run_dir / name)}
        launcher = entry.launch or pipeline.launch
        if entry.num_policies is None:
            _run_stage(name, run_dir / name, path.parent / entry.recipe, launcher, overrides_here)
        for policy in range(entry.num_policies or 0):
            folder = run_dir / name / f"policy-{policy}"
            _run_stage(name, folder, path.parent / entry.recipe, launcher, overrides_here | {"policy": policy})
        if name == until:
            break


def _references(entry: StageEntry, run_dir: Path) -> dict[str, object]:
    """The recipe keys that name outputs of earlier stages."""
    references: dict[str, object] = {}
    if entry.model:
        references["model_name_or_path"] = str(run_dir / entry.model)
    if entry.reward_model:
        references["reward_model"] = str(run_dir / entry.reward_model)
    if entry.policies:
        references["policies"] = [str(run_dir / policy) for policy in entry.policies]
    return references


def _run_stage(name: str, output_dir: Path, config: Path, launch: str, overrides: dict[str, object]) -> None:
    """
    Args:
        output_dir: what it writes; the recipe's output_dir, or the folder of one policy in it.
    """
    wanted = contract.fingerprint(name, recipe.load_yaml(config) | overrides)
    previous = output_dir.with_name(f"{output_dir.name}.previous")
    if contract.belongs_to(previous, wanted) and not contract.is_done(output_dir, wanted):
        # The recipe is again what it was: both change places, neither is lost.
        if output_dir.is_dir():
            aside = output_dir.with_name(f"{output_dir.name}.aside")
            output_dir.rename(aside)
            previous.rename(output_dir)
            aside.rename(previous)
        else:
            previous.rename(output_dir)
    if contract.is_done(output_dir, wanted):
        print(f"{name}: up to date ({output_dir})")
        return
    if not Path(launch).is_file():
        raise UserError(
            f"{config}: there is no accelerate config {launch}; run from the project's folder, or set launch"
        )
    # What was made before is set aside until its replacement is done; a replacement that made nothing puts it back.
    changes = contract.what_changed(output_dir, wanted)
    if changes:
        print(f"{name}: runs again, because {'; '.join(changes)}", flush=True)
        if previous.is_dir() and not (output_dir / contract.DONE).is_file():
            shutil.rmtree(output_dir)  # an unfinished replacement
        else:
            shutil.rmtree(previous, ignore_errors=True)
            output_dir.rename(previous)
    try:
        status = _launch(name, config, launch, overrides)
    finally:
        if previous.is_dir() and not (output_dir / contract.DONE).is_file() and not contract.has_progress(output_dir):
            shutil.rmtree(output_dir, ignore_errors=True)
            previous.rename(output_dir)
    if status:
        raise SystemExit(status)
    shutil.rmtree(previous, ignore_errors=True)


def _launch(name: str, config: Path, launch: str, overrides: dict[str, object]) -> int:
    """The stage's exit status."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", launch]
    command += ["-m", f"gemma2_post.{name}", "--config", str(config)]
    command += [f"--{key}={json.dumps(value)}" for key, value in overrides.items()]  # JSON is YAML
    with tempfile.TemporaryDirectory() as directory:
        # accelerate makes 1 of every exit status of the stage.
        status_file = Path(directory) / "status"
        finished = subprocess.run(command, env=os.environ | {EXIT_STATUS_FILE: str(status_file)})
        return int(status_file.read_text()) if status_file.is_file() else finished.returncode
