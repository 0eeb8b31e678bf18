"""`summary.json`: what a run has made, for programs."""

from statistics import mean

from gemma2_post.pipeline.steps import Pipeline, Step
from gemma2_post.stage import contract
from gemma2_post.stage.command import first_grader

FILE = "summary.json"
MODELS = "models.json"
"""What a stage writes that measures models: by model."""
FRONT = "front.json"
"""What a stage writes that measures the points of a merge."""


def write(pipeline: Pipeline, status: str, seconds: float) -> None:
    """Writes the file.

    Args:
        status: running, done, failed, "below its gate" or interrupted.
        seconds: that this run has taken; 0 where it had nothing to do keeps what the last one took.
    """
    run_dir = pipeline.run_dir
    earlier = contract.read_json(run_dir / FILE) or {"wall_seconds": 0.0}
    content = {
        "run": run_dir.name,
        "recipe": str(pipeline.path),
        "status": status,
        "wall_seconds": round(seconds, 1) or earlier["wall_seconds"],
        "stages": _stages(pipeline),
        "headlines": _headlines(pipeline),
        "grader": _grader(pipeline),
        "models": _models(pipeline),
        "liti": _liti(pipeline),
    }
    contract.write_json(run_dir / FILE, content)


def _stages(pipeline: Pipeline) -> dict[str, dict]:
    """By folder in the run folder; of an entry with policies also the means over them."""
    steps = [step for _, each in pipeline.steps() for step in each]
    stages = {str(step.folder.relative_to(pipeline.run_dir)): _stage(step) for step in steps}
    for name, entry in pipeline.entries.items():
        policies = [stages[key] for key in stages if entry.num_policies and key.startswith(f"{name}/")]
        if policies and all(policy["status"] == "done" for policy in policies):
            stages[name] = {
                "status": "done",
                "wall_seconds": max(policy["wall_seconds"] for policy in policies),
                "output_dir": str(pipeline.run_dir / name),
                "metrics": _means([policy["metrics"] for policy in policies]),
            }
    return stages


def _stage(step: Step) -> dict:
    done = contract.read_json(step.folder / contract.DONE)
    found = {"status": "done", "wall_seconds": done["wall_seconds"]} if done else {"status": "not done"}
    found |= {"output_dir": str(step.folder), "metrics": done["metrics"] if done else {}}
    return found | ({"gates": step.gates} if step.gates else {})


def _headlines(pipeline: Pipeline) -> dict[str, str]:
    """By folder of a finished stage: the number that says how it went."""
    found = {}
    for _, steps in pipeline.steps():
        for step in steps:
            if done := contract.read_json(step.folder / contract.DONE):
                name = str(step.folder.relative_to(pipeline.run_dir))
                found[name] = step.command.headline_of(step.keys, done["metrics"])
    return found


def _grader(pipeline: Pipeline) -> str | None:
    """The grade that is shown first: that of the last stage which has a grader."""
    found = [first_grader(pipeline.values_of(name)) for name in pipeline.entries]
    return next((grader for grader in reversed(found) if grader), None)


def _models(pipeline: Pipeline) -> dict[str, dict[str, float]]:
    """Of the last evaluation, if the models still are what it measured; of an entry with policies also the means."""
    measured: dict[str, dict[str, float]] = {}
    for name in pipeline.entries:
        folder = pipeline.run_dir / name
        if (folder / MODELS).is_file() and (done := contract.read_json(folder / contract.DONE)):
            inputs = done["fingerprint"]["inputs"]
            is_of_them = all(
                contract.input_digest(path) == digest for path, digest in inputs.items() if "@" not in path
            )
            measured = contract.read_json(folder / MODELS) or measured if is_of_them else {}
    models: dict[str, dict[str, float]] = {}
    for name, values in measured.items():
        models[name] = values
        entry = pipeline.entries.get(name.partition("/")[0])
        if entry and entry.num_policies:
            policies = [key for key in models if key.startswith(f"{name.partition('/')[0]}/")]
            if len(policies) == entry.num_policies:
                models[name.partition("/")[0]] = _means([models[policy] for policy in policies])
    return models


def _means(values: list[dict[str, float]]) -> dict[str, float]:
    """Without intervals, which are of one policy."""
    keys = [key for key in values[0] if not key.endswith(("/standard_error", "/low", "/high"))]
    return {key: mean(each[key] for each in values) for key in keys if all(key in each for each in values)}


def _liti(pipeline: Pipeline) -> list[dict[str, float]]:
    """The sweep of the last merge: its points by eta."""
    for name in reversed(pipeline.entries):
        front = contract.read_json(pipeline.run_dir / name / FRONT)
        if front:
            sweep = [point for point in front["points"] if point["series"] == front["released"]["series"]]
            keys = ("kl_to_init", "reward", _grader(pipeline))
            return [{"eta": point["position"]} | {key: point[key] for key in keys if key in point} for point in sweep]
    return []
