"""What a check found."""

from dataclasses import dataclass, field
from typing import Literal

State = Literal["pass", "fail", "skipped"]


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    name: str
    state: State
    found: str
    """What was measured, with its tolerance; or why this cannot be tested here."""
    remedy: str = ""
    """What to do about it."""
    log: str = ""
    """The last lines of a process that failed."""
    numbers: dict[str, float] = field(default_factory=dict)
    """What was measured, for machines."""


def judged(name: str, passes: bool, found: str, remedy: str, **numbers: float) -> Result:
    """The result of a check that passes or fails; only a failure needs its remedy."""
    return Result(name, "pass" if passes else "fail", found, "" if passes else remedy, numbers=numbers)
