"""Reads the files of a run for a report: what a crash has damaged is left out, and named."""

import base64
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.stages import STAGES

_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


@dataclass
class Files:
    """The files that a report reads."""

    left_out: list[str] = field(default_factory=list)
    """What could not be shown, each with the reason."""

    def lines(self, path: Path, keys: contract.Keys) -> list[dict[str, Any]]:
        """The JSON records in a file that have these keys; none if it is missing."""
        records = contract.records_of(path.read_bytes(), keys) if path.is_file() else []
        damaged = [f"line {i} ({each})" for i, each in enumerate(records, start=1) if isinstance(each, ValueError)]
        if damaged:
            more = f" and {len(damaged) - 1} more" if damaged[1:] else ""
            self.left_out.append(f"{path}, {damaged[0]}{more}")
        return [each for each in records if not isinstance(each, ValueError)]

    def record(self, path: Path, keys: contract.Keys) -> dict[str, Any] | None:
        """The JSON object in a file that has these keys; None if it is missing or damaged."""
        try:
            found: dict[str, Any] | None = contract.read_json(path, keys)
        except UserError as error:
            self.left_out.append(str(error).partition(";")[0])
            return None
        return found

    def done(self, folder: Path) -> dict[str, Any] | None:
        """The stage file of a finished stage; None if there is none that can be read."""
        try:
            done = contract.read_done(folder)
        except UserError as error:
            self.left_out.append(str(error).partition(";")[0])
            return None
        if done and done["stage"] not in STAGES:
            self.left_out.append(f"{folder / contract.DONE}, of the stage {done['stage']}, which is no stage")
            return None
        return done

    def picture(self, path: Path) -> str | None:
        """A PNG file in base64; None if it is cut."""
        content = path.read_bytes()
        if content.startswith(_PNG) and content.endswith(_PNG_END):
            return base64.b64encode(content).decode()
        self.left_out.append(f"{path}, which is no whole picture")
        return None

    def warn(self) -> None:
        """Names what was left out in one line on stderr."""
        if self.left_out:
            print(f"warning: the report leaves out what is damaged: {'; '.join(self.left_out)}", file=sys.stderr)
