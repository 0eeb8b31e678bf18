"""Work on many rows in parts, on all cores: each finished part is a file, so a run that was killed goes on."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from tqdm import tqdm

from gemma2_post.data.forked import on_all_cores

Part = TypeVar("Part")


def work_on(work: Callable[[Part], int], parts: Iterable[Part], doing: str, num_rows: int | None = None) -> None:
    """Calls a function for each part, and shows how many rows are done.

    Args:
        work: Returns the number of rows that it has done.
        num_rows: Of all parts, if it is known.
    """
    with tqdm(desc=doing, total=num_rows, unit=" rows", delay=1) as bar:
        for done in on_all_cores(work, parts, doing):
            bar.update(done)
