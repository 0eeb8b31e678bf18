"""Gates: what a stage's metrics must reach before the next stage may start."""

import operator
import re
from collections.abc import Mapping
from pathlib import Path

from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.stages import command_of

_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_BOUND = re.compile(r"(>=|<=|>|<)\s*([-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)")


class GateError(UserError):
    """A stage is done, but its metrics are out of bounds."""

    status = 3


def check_bounds(gates: Mapping[str, object]) -> None:
    """Raises a `UserError` if a bound is no comparison such as ">= 0.65"."""
    for metric, bound in gates.items():
        if not isinstance(bound, str) or not _BOUND.fullmatch(bound):
            raise UserError(f'the gate {metric} is {bound!r}; write a comparison in quotes, such as ">= 0.65"')


def passes(value: float, bound: str) -> bool:
    """Whether a metric is within its bound."""
    match = _BOUND.fullmatch(bound)
    assert match is not None, "check_bounds has accepted it"
    return _COMPARISONS[match[1]](value, float(match[2]))


def check_metrics(gates: dict[str, str], known: set[str]) -> None:
    """Raises a `UserError` if a gate is on a metric that the stage will not measure.

    Args:
        known: Names of its metrics, without breakdowns such as `accuracy/names`, which are allowed.
    """
    for metric in gates:
        if metric.partition("/")[0] not in known:
            raise UserError(
                f"the gate is on {metric}, which it does not measure; it measures {', '.join(sorted(known))}"
            )


def check(label: str, stage: str, folder: Path, gates: dict[str, str]) -> None:
    """Checks the metrics of a finished step against its gates.

    Args:
        label: Label of the step, for the error.
        folder: Its output.

    Raises:
        UserError: The stage has no such metric.
        GateError: A metric is out of bounds.
    """
    for metric, bound in gates.items():
        metrics = contract.metrics_of(folder)
        if metric not in metrics:
            names = ", ".join(name for name in sorted(metrics) if "/" not in name)
            raise UserError(f"{label}: the gate is on {metric}, which it does not measure; it measures {names}")
        if not passes(metrics[metric], bound):
            raise GateError(
                f"{label}: {metric} is {metrics[metric]:.4g}, and its gate wants {bound} ({folder}); the "
                f"next stage does not start. {command_of(stage).below_gate}"
            )
