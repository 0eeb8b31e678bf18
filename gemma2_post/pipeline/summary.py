"""`summary.json`: what a run made, for programs."""

from pathlib import Path
from statistics import mean
from typing import Any

from gemma2_post.pipeline.steps import Pipeline, Step
from gemma2_post.stage import contract
from gemma2_post.stage.command import first_grader
from gemma2_post.stage.contract import State

FILE = "summary.json"
_KEYS: contract.Keys = {
    **dict.fromkeys(("run", "recipe", "status"), str),
    **dict.fromkeys(("stages", "models"), dict),
    "wall_seconds": contract.NUMBER,
}
FRONT = "front.json"
"""File of a stage that measures the points of a merge."""


def read(run_dir: Path) -> dict[str, Any] | None:
    """What the last run recorded; None if there was none.

    Raises:
        UserError: The file is damaged.
    """
    return contract.read_json(run_dir / FILE, _KEYS, "remove it; the next run writes it again")


def write(pipeline: Pipeline, status: str, seconds: float) -> None:
    """Writes the file.

    Args:
        status: "done", "failed", "below its gate" or "interrupted".
        seconds: Duration of this run; 0, for a run that had nothing to do, keeps the last run's duration.
    """
    run_dir = pipeline.run_dir
    earlier = read(run_dir) or {"wall_seconds": 0.0}
    content = {
        "run": run_dir.name,
        "recipe": str(pipeline.path),
        "status": status,
        "wall_seconds": round(seconds, 1) or earlier["wall_seconds"],
        "stages": _stages(pipeline),
        "headlines": _headlines(pipeline),
        "grader": _grader(pipeline),
        "models": _models(pipeline),
        "gains": _gains(pipeline),
        "reward_model": _of_reward_model(pipeline),
        "failed": _failed(pipeline),
        "liti": _liti(pipeline),
        "selections": _selections(pipeline),
        "releases": _releases(pipeline),
    }
    contract.write_json(run_dir / FILE, content)


def _stages(pipeline: Pipeline) -> dict[str, dict]:
    """Steps by folder in the run folder; for an entry with policies, also the means over them."""
    steps = [step for _, each in pipeline.steps() for step in each]
    stages = {str(step.folder.relative_to(pipeline.run_dir)): _stage(step) for step in steps}
    for name, entry in pipeline.entries.items():
        policies = [stages[key] for key in stages if entry.overrides and key.startswith(f"{name}/")]
        if policies and all(policy["status"] == "done" for policy in policies):
            stages[name] = {
                "status": "done",
                "wall_seconds": max(policy["wall_seconds"] for policy in policies),
                "output_dir": str(pipeline.run_dir / name),
                "metrics": _means([policy["metrics"] for policy in policies]),
            }
    return stages


def _stage(step: Step) -> dict:
    done, status = contract.read_done(step.folder), "not done"
    if done:
        state, _ = contract.state_of(step.folder, step.command.fingerprint(step.keys))
        status = "out of date" if state == State.OTHER else "done"
    found = {"status": status} | ({"wall_seconds": done["wall_seconds"]} if done else {})
    found |= {"output_dir": str(step.folder), "metrics": done["metrics"] if done else {}}
    found |= {"gates": step.gates} if step.gates else {}
    return found | ({"overrides": step.overrides} if step.overrides else {})


def _headlines(pipeline: Pipeline) -> dict[str, str]:
    """The most important metric of each finished step, by folder."""
    return {
        str(step.folder.relative_to(pipeline.run_dir)): step.command.headline_of(step.keys, done["metrics"])
        for _, steps in pipeline.steps()
        for step in steps
        if (done := contract.read_done(step.folder))
    }


def _grader(pipeline: Pipeline) -> str | None:
    """The metric that is shown first: the grader of the last stage that has one."""
    found = [first_grader(pipeline.values_of(name)) for name in pipeline.entries]
    return next((grader for grader in reversed(found) if grader), None)


def _last_evaluation(pipeline: Pipeline) -> Path | None:
    """The folder of the last evaluation, if the models are unchanged; parts of it may have failed."""
    for step in reversed([step for _, each in pipeline.steps() for step in each]):
        folder = step.folder
        made = contract.read_done(folder) or ((folder / contract.FAILED).is_file() and contract.read_begun(folder))
        if (folder / contract.MODELS).is_file() and made:
            # Of models on the Hub, the hashes of files, which are not known offline.
            local = [each for each in made["fingerprint"]["inputs"].values() if isinstance(each, str)]
            wanted = step.command.fingerprint(step.keys)["inputs"].values()
            return folder if all(digest in wanted for digest in local) else None
    return None


def _gains(pipeline: Pipeline) -> list[dict[str, Any]]:
    """The paired differences from the last evaluation; see `evaluation.comparison.Comparison.gains`."""
    folder = _last_evaluation(pipeline)
    return (contract.read_json(folder / contract.GAINS) or []) if folder else []


def _of_reward_model(pipeline: Pipeline) -> dict[str, float]:
    """How often the reward model is right on known sets, from the last evaluation."""
    folder = _last_evaluation(pipeline)
    return (contract.read_json(folder / contract.KNOWN_SETS) or {}) if folder else {}


def _failed(pipeline: Pipeline) -> dict[str, str]:
    """The parts of the last evaluation that could not be measured, with the reasons."""
    folder = _last_evaluation(pipeline)
    return (contract.read_json(folder / contract.FAILED) or {}) if folder else {}


def _models(pipeline: Pipeline) -> dict[str, dict[str, float]]:
    """Metrics from the last evaluation; for an entry with policies, also the means."""
    folder = _last_evaluation(pipeline)
    measured: dict[str, dict[str, float]] = (contract.read_json(folder / contract.MODELS, {}) or {}) if folder else {}
    models: dict[str, dict[str, float]] = {}
    for name, values in measured.items():
        models[name] = values
        first = name.partition("/")[0]
        entry = pipeline.entries.get(first)
        if entry and entry.overrides:
            policies = [models[key] for key in models if key.startswith(f"{first}/")]
            if len(policies) == len(entry.overrides):
                models[first] = _means(policies)
    return models


def _means(values: list[dict[str, float]]) -> dict[str, float]:
    """Means of metrics, without intervals, which are for single policies."""
    keys = [key for key in values[0] if not key.endswith(("/standard_error", "/low", "/high"))]
    return {key: mean(each[key] for each in values) for key in keys if all(key in each for each in values)}


def _selections(pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    """The finished selections, by the entry that holds what was chosen; see `select`."""
    steps = [step for _, each in pipeline.steps() for step in each if step.stage == "select"]
    name_of = {selection: name for name, selection in pipeline.chosen_by.items()}
    return {
        name_of.get(step.entry, step.entry): contract.read_json(step.folder / contract.CHOICE)
        for step in steps
        if contract.read_done(step.folder)
    }


def _releases(pipeline: Pipeline) -> dict[str, str]:
    """What was released from each front, in words, where something else than the reward chose; by entry."""
    found = {}
    for name in pipeline.entries:
        front = contract.read_json(pipeline.run_dir / name / FRONT)
        if front and front.get("why") and contract.read_done(pipeline.run_dir / name):
            found[name] = front["why"]
    return found


def _liti(pipeline: Pipeline) -> list[dict[str, Any]]:
    """The points of the last merge's sweep, by eta."""
    for name in reversed(pipeline.entries):
        if front := contract.read_json(pipeline.run_dir / name / FRONT, {"points": list, "released": dict}):
            sweep = [point for point in front["points"] if point["series"] == front["released"]["series"]]
            keys = [key for key in ("kl_to_init", "reward", _grader(pipeline)) if key]
            return [{"eta": point["position"]} | {key: point[key] for key in keys if key in point} for point in sweep]
    return []
