"""What a stage must reach before the next may start."""

import operator
import re
from pathlib import Path

from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.stages import command_of

_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_BOUND = re.compile(r"(>=|<=|>|<)\s*([-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)")


class GateError(UserError):
    """A stage is done, but not good enough for the next."""

    status = 3


def check_bounds(gates: dict[str, object]) -> None:
    for metric, bound in gates.items():
        if not isinstance(bound, str) or not _BOUND.fullmatch(bound):
            raise UserError(f'the gate {metric} is {bound!r}; write a comparison in quotes, such as ">= 0.65"')


def passes(value: float, bound: str) -> bool:
    comparison, limit = _BOUND.fullmatch(bound).groups()
    return _COMPARISONS[comparison](value, float(limit))


def check_metrics(gates: dict[str, str], known: set[str]) -> None:
    """Refuses a gate on what the stage will not measure.

    Args:
        known: names of its metrics; one broken down by a group, as `accuracy/names`, may follow each.
    """
    for metric in gates:
        if metric.partition("/")[0] not in known:
            raise UserError(
                f"the gate is on {metric}, which it does not measure; it measures {', '.join(sorted(known))}"
            )


def check(label: str, stage: str, folder: Path, gates: dict[str, str]) -> None:
    """Refuses to go on from a finished step whose numbers do not pass.

    Args:
        label: of the step, for the error.
        folder: its output.

    Raises:
        UserError: the stage has no such metric.
        GateError: a metric is out of its bound.
    """
    for metric, bound in gates.items():
        metrics = contract.read_json(folder / contract.DONE)["metrics"]
        if metric not in metrics:
            names = ", ".join(name for name in sorted(metrics) if "/" not in name)
            raise UserError(f"{label}: the gate is on {metric}, which it does not measure; it measures {names}")
        if not passes(metrics[metric], bound):
            raise GateError(
                f"{label}: {metric} is {metrics[metric]:.4g}, and its gate wants {bound} ({folder}); the "
                f"next stage does not start. {command_of(stage).below_gate}"
            )
