"""Memory of a process and its children, shared pages divided among those that map them (PSS)."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = 0.2
"""Between two samples."""


def memory_of(pid: int) -> tuple[int, int]:
    """Bytes that a process and its children hold: in all, and without mapped files."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    total = files = 0
    for member in family:
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
        total += sizes["Pss"]
        files += sizes["Pss_File"]
    return total, total - files


class Sampler:
    """Samples the memory of a running process until it ends; peaks by phase."""

    def __init__(self, pid: int, phase: Callable[[], str] = lambda: "all"):
        self.peaks: dict[str, tuple[int, int]] = {}
        """Bytes in all, and without mapped files, by phase."""
        self._pid, self._phase = pid, phase
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while Path(f"/proc/{self._pid}/smaps_rollup").exists():
            total, without_files = memory_of(self._pid)
            if not total:  # a zombie
                break
            phase = self._phase()
            before = self.peaks.get(phase, (0, 0))
            self.peaks[phase] = max(total, before[0]), max(without_files, before[1])
            time.sleep(SECONDS)

    def join(self) -> None:
        """Waits for the process to end."""
        self._thread.join()
