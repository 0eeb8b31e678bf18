"""Runs the stages of a pipeline recipe, each as its own `accelerate launch`; skips those that are up to date.

Nothing here imports torch, so a run with everything up to date ends at once.
"""

import gc
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import get_context
from pathlib import Path
from queue import Queue
from typing import Protocol

from gemma2_post.pipeline import devices, gates, lock, processes, summary
from gemma2_post.pipeline.decisions import Action, Choice, Decision, decide, forecast, replace
from gemma2_post.pipeline.steps import Pipeline, Step
from gemma2_post.stage import card, contract
from gemma2_post.stage import launcher as launchers
from gemma2_post.stage.contract import State
from gemma2_post.stage.errors import UserError, located, reported
from gemma2_post.stage.fingerprint import Fingerprint
from gemma2_post.stage.launcher import Launcher
from gemma2_post.stage.quiet import silence_libraries
from gemma2_post.stage.recipe_file import load_recipe

LOGS = "logs"
_BEAT = 10.0
"""Seconds between two signs of life."""


class StageError(UserError):
    """A stage failed."""

    status = 4


class Interrupted(BaseException):
    """Someone asked the run to end."""


class View(Protocol):
    """Where a run shows its progress; see `report/terminal.py`."""

    def begin(self, run_dir: Path, steps: list[tuple[Step, Path]]) -> None: ...

    def set(self, label: str, state: str, note: str | None = None, seconds: float | None = None) -> None: ...

    def say(self, line: str) -> None: ...

    def beat(self) -> None: ...

    def end(self, status: str) -> None: ...

    def live(self) -> AbstractContextManager[None]: ...


def run(pipeline: Pipeline, until: str | None, view: View, choices: dict[str, Choice]) -> bool:
    """Runs the stages in order, up to and including `until`.

    Args:
        choices: What the user says about steps, by label.

    Returns:
        Whether there was anything to do.

    Raises:
        UserError: A mistake that the user can fix, a failed stage, or a failed gate.
        SystemExit: Someone interrupted the run; the same command resumes it.
    """
    rounds = pipeline.steps(until)
    steps = [step for _, each in rounds for step in each]
    began = time.monotonic()
    with lock.held(pipeline.run_dir), _interruptible():
        _check_folders(pipeline, steps)
        view.begin(pipeline.run_dir, [(step, _log(pipeline, step)) for step in steps])
        current = _Run(pipeline, until, view, choices)
        status = "failed"
        try:
            if processes.end_all(pipeline.run_dir):
                print("ended processes that an earlier, killed run had left running", flush=True)
            with view.live():
                for number in range(len(rounds)):  # anew, because what a selection has chosen decides later keys
                    current.round(*pipeline.steps(until)[number])
            status = "done"
        except gates.GateError:
            status = "below its gate"
            raise
        except Interrupted as interrupted:
            status = "interrupted"
            raise SystemExit(130) from interrupted
        finally:
            # A stage that died by itself may also leave processes behind.
            processes.end_all(pipeline.run_dir)
            if current.has_begun or status != "failed":
                summary.write(pipeline, status, time.monotonic() - began if current.has_begun else 0.0)
            view.end(status)
            if status == "interrupted":
                again = {Choice.RERUN, Choice.FRESH} & {*choices.values()}
                without = f" without --{' and --'.join(sorted(each.value for each in again))}" if again else ""
                view.say(f"interrupted; the same command{without} resumes")
    return current.has_begun


def explain(pipeline: Pipeline, until: str | None, choices: dict[str, Choice]) -> None:
    """Prints what `run` would do, and why."""
    for step, decision, reads in forecast(pipeline, until, choices):
        if reads and choices.get(step.label) != Choice.KEEP:
            print(f"{step.label}: runs after {', '.join(reads)}")
        else:
            nothing = "up to date" if decision.action == Action.KEEP else "runs for the first time"
            print(f"{step.label}: {decision.why or nothing}")


def _check(pipeline: Pipeline, until: str | None, to_run: set[str], replaced: set[str]) -> None:
    """Checks the whole pipeline, in a separate process because that imports torch.

    Args:
        to_run: Labels of the steps that may run; the others need neither devices nor space.
        replaced: Labels of those whose present output is set aside.

    Raises:
        SystemExit: Something is wrong; the process has printed what.
    """
    process = get_context("spawn").Process(target=_check_here, args=(pipeline, until, to_run, replaced), daemon=True)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def _check_here(pipeline: Pipeline, until: str | None, to_run: set[str], replaced: set[str]) -> None:
    gc.disable()  # the process imports much and ends soon
    silence_libraries()
    from gemma2_post.pipeline import check
    from gemma2_post.planning import memory

    with reported():
        jobs = check.check(pipeline, until, to_run)
        with located(pipeline.path):
            memory.check_disk(pipeline.run_dir, [job for job in jobs if job.label in to_run], replaced)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and Ctrl-C raise `Interrupted`, once: a second one must not stop the cleanup."""

    def interrupt(*_: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted

    before = {each: signal.signal(each, interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _log(pipeline: Pipeline, step: Step) -> Path:
    return pipeline.run_dir / LOGS / f"{str(step.folder.relative_to(pipeline.run_dir)).replace('/', '-')}.log"


def _check_folders(pipeline: Pipeline, steps: list[Step]) -> None:
    """Refuses another pipeline's run folder, and folders in it that no stage has made or a crash has damaged."""
    earlier = summary.read(pipeline.run_dir)
    if earlier and Path(earlier["recipe"]).resolve() != pipeline.path.resolve():
        raise UserError(
            f"{pipeline.path}: {pipeline.run_dir} is the folder of {earlier['recipe']}; give another --run_dir, or, "
            f"if that recipe has become this one, remove {pipeline.run_dir / summary.FILE}"
        )
    for step in steps:
        contract.refuse_strange_files(step.folder)


def wanted_of(step: Step) -> Fingerprint:
    """The fingerprint of the output that the step would make."""
    return step.command.fingerprint(step.keys)


class _Run:
    """A run of a pipeline in progress."""

    def __init__(self, pipeline: Pipeline, until: str | None, view: View, choices: dict[str, Choice]):
        self.pipeline, self.until, self.view, self.choices = pipeline, until, view, choices
        self.recipes = {file: load_recipe(file) for file in map(pipeline.config_of, pipeline.entries)}
        self.has_begun = False

    def round(self, config: str, steps: list[Step]) -> None:
        """Runs the steps that are not up to date, side by side if devices allow it; then checks their gates."""
        for step in steps:
            self._check_recipe(step)
        launcher = launchers.read(config)
        decisions = {step.label: self._decide(step) for step in steps}
        to_run = [step for step in steps if decisions[step.label].action != Action.KEEP]
        if to_run:
            if not self.has_begun:  # everything is checked before the first stage starts
                to_run_at_all, replaced = set(), set()
                for step, decision, reads in forecast(self.pipeline, self.until, self.choices):
                    if reads or decision.action != Action.KEEP:
                        to_run_at_all.add(step.label)
                    if reads or decision.action == Action.RUN:
                        replaced.add(step.label)
                _check(self.pipeline, self.until, to_run_at_all, replaced)
                self.has_begun = True
            places = devices.places(launcher, len(steps))
            free: Queue[dict[str, str]] = Queue()
            for place in places:
                free.put(place)

            def run_step(step: Step) -> None:
                place = free.get()
                try:
                    self._run_step(step, decisions[step.label], config, launcher, place)
                finally:
                    free.put(place)

            with ThreadPoolExecutor(len(places)) as pool:
                running: list[Future[None]] = []
                try:
                    running += (pool.submit(run_step, step) for step in to_run)
                    while wait(running, timeout=_BEAT).not_done:
                        self.view.beat()
                except Interrupted:
                    pool.shutdown(wait=False, cancel_futures=True)
                    processes.end_all(self.pipeline.run_dir)
                    while not all(each.done() for each in running):  # one was about to start its process
                        time.sleep(0.1)
                        processes.end_all(self.pipeline.run_dir)
                    raise
            for each in running:
                each.result()
        bounds = {step.folder: step.gates for _, several in self.pipeline.steps() for step in several}
        for step in steps:
            try:
                gates.check(step.label, step.stage, step.folder, step.gates)
            except gates.GateError:
                self.view.set(step.label, "below its gate")
                raise
            card.end(step.folder, bounds)

    def _check_recipe(self, step: Step) -> None:
        """Refuses a recipe that was edited during the run: it is not what was checked, nor what came before it."""
        if step.config in self.recipes and load_recipe(step.config) != self.recipes[step.config]:
            raise UserError(
                f"{step.config} was edited since this run began, so {step.label} was not begun; run the same command "
                "to go on with what it says now, or undo the change first"
            )

    def _decide(self, step: Step) -> Decision:
        """What to do with a step; shows that, and brings back an output that was replaced if it is wanted again."""
        wanted, choice = wanted_of(step), self.choices.get(step.label)
        decision = decide(self.pipeline, step, wanted, choice)
        if decision.replaced:
            self.view.say(f"{step.label}: {decision.why}")
            replace(self.pipeline, step)
            decision.replaced.rename(step.folder)
            decision = decide(self.pipeline, step, wanted, choice)
        if decision.why:
            self.view.say(f"{step.label}: {decision.why}")
        if decision.action == Action.KEEP:
            metrics = contract.metrics_of(step.folder)
            self.view.set(step.label, "up to date", step.command.headline_of(step.keys, metrics))
        return decision

    def _run_step(
        self, step: Step, decision: Decision, config: str, launcher: Launcher, environment: dict[str, str]
    ) -> None:
        """Runs a step; what was in its folder is kept among the replaced outputs, or comes back if nothing is made."""
        self._check_recipe(step)
        log = _log(self.pipeline, step)
        replaced = replace(self.pipeline, step) if decision.action == Action.RUN else None
        self.view.set(step.label, "running", f"log: {log}")
        began = time.monotonic()
        try:
            status = processes.launch(step, config, launcher, environment, self.pipeline.run_dir, log)
            if not status and contract.state_of(step.folder, wanted_of(step))[0] == State.UNMEASURED:
                # It was begun with other measurements than it was finished with; `training/run.py` says why.
                status = processes.launch(step, config, launcher, environment, self.pipeline.run_dir, log)
        finally:
            is_done = (step.folder / contract.DONE).is_file()
            if replaced and not is_done and not contract.has_progress(step.folder):
                contract.discard(step.folder)
                replaced.rename(step.folder)
        seconds = time.monotonic() - began
        if status or not is_done:
            self.view.set(step.label, "failed", f"status {status}", seconds)
            raise _failure(step, status, log)
        metrics = contract.metrics_of(step.folder)
        self.view.set(step.label, "done", step.command.headline_of(step.keys, metrics), seconds)


def _failure(step: Step, status: int, log: Path) -> UserError:
    """The error of a failed stage: its last words, and where to read more."""
    *lines, last = processes.last_words(log) or [""]
    if status in (UserError.status, StageError.status) and last.startswith("error: "):
        kind = UserError if status == UserError.status else StageError
        return kind(f"{step.label}: {last.removeprefix('error: ')} (log: {log})")
    words = "\n".join([*lines, last])
    return StageError(
        f"{step.label} failed with status {status}; {log} ends with\n{words}\n"
        "the same command resumes from its newest checkpoint"
    )
