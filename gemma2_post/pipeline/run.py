"""Runs the stages of a pipeline recipe, each as its own `accelerate launch`; skips those that are up to date.

Nothing here imports torch: with everything up to date the answer comes at once.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from gemma2_post.core import contract, recipe
from gemma2_post.core.errors import EXIT_STATUS_FILE, UserError
from gemma2_post.pipeline import devices, gates, lock
from gemma2_post.pipeline.steps import Step, load_pipeline, rounds


def run(
    path: Path,
    until: str | None,
    overrides: dict[str, dict[str, object]],
    run_dir: Path | None = None,
    seed: int | None = None,
) -> None:
    """Runs the stages in order, up to and including `until`.

    Args:
        overrides: stage name to recipe keys that take the place of the recipe's.
        run_dir: in place of the pipeline's.
        seed: of every stage, in place of the recipes'.
    """
    pipeline = load_pipeline(path)
    for name in [*([until] if until else []), *overrides]:
        if name not in pipeline.entries:
            raise UserError(f"{path}: there is no stage {name}; it has {', '.join(pipeline.entries)}")
    pipeline.run_dir = run_dir or pipeline.run_dir
    seeds = {} if seed is None else {"seed": seed}
    pipeline.overrides = {name: seeds | overrides.get(name, {}) for name in pipeline.entries}
    with lock.held(pipeline.run_dir) as held:
        for name in pipeline.entries:
            for launch, steps in rounds(pipeline, name):
                _run_round(launch, steps, held)
                for step in steps:
                    gates.check(step)
            if name == until:
                break


def _run_round(launch: str, steps: list[Step], held: int) -> None:
    """Runs what is not up to date; side by side where there are devices for it.

    Args:
        held: the lock of the run folder.
    """
    if not Path(launch).is_file():
        raise UserError(f"there is no accelerate config {launch}; run from the project's folder, or set launch")
    places = devices.places(Path(launch), len(steps))
    free: Queue[dict[str, str]] = Queue()
    for place in places:
        free.put(place)

    def run_step(step: Step) -> None:
        place = free.get()
        try:
            _run_step(step, launch, place, held)
        finally:
            free.put(place)

    with ThreadPoolExecutor(len(places)) as pool:
        for finished in [pool.submit(run_step, step) for step in steps]:
            finished.result()


def _run_step(step: Step, launch: str, environment: dict[str, str], held: int) -> None:
    """
    Args:
        environment: variables that say which devices are the step's.
    """
    output_dir = step.folder
    wanted = contract.fingerprint(step.stage, (recipe.load_yaml(step.config) if step.config else {}) | step.values)
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
        print(f"{step.label}: up to date ({output_dir})")
        return
    # What was made before is set aside until its replacement is done; a replacement that made nothing puts it back.
    changes = contract.what_changed(output_dir, wanted)
    if changes:
        print(f"{step.label}: runs again, because {'; '.join(changes)}", flush=True)
        if previous.is_dir() and not (output_dir / contract.DONE).is_file():
            shutil.rmtree(output_dir)  # an unfinished replacement
        else:
            shutil.rmtree(previous, ignore_errors=True)
            output_dir.rename(previous)
    try:
        status = _launch(step, launch, environment, held)
    finally:
        if previous.is_dir() and not (output_dir / contract.DONE).is_file() and not contract.has_progress(output_dir):
            shutil.rmtree(output_dir, ignore_errors=True)
            previous.rename(output_dir)
    if status:
        raise SystemExit(status)
    shutil.rmtree(previous, ignore_errors=True)


def _launch(step: Step, launch: str, environment: dict[str, str], held: int) -> int:
    """The stage's exit status."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", launch]
    command += ["-m", f"gemma2_post.{step.stage}", *(["--config", str(step.config)] if step.config else [])]
    command += [f"--{key}={json.dumps(value)}" for key, value in step.values.items()]  # JSON is YAML
    with tempfile.TemporaryDirectory() as directory:
        # accelerate makes 1 of every exit status of the stage.
        status_file = Path(directory) / "status"
        variables = os.environ | environment | {EXIT_STATUS_FILE: str(status_file)}
        finished = subprocess.run(command, env=variables, pass_fds=[held])
        return int(status_file.read_text()) if status_file.is_file() else finished.returncode
