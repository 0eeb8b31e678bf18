"""Which checkpoint a run resumes from: the newest one that a crash has not cut."""

import json
import logging
import zipfile
from pathlib import Path

from gemma2_post.models.folder import read_header
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError

logger = logging.getLogger(__name__)

TRAINER_FILE = "trainer_state.json"
"""The file that the Trainer writes last into a checkpoint."""
_ZIPPED = {".pt", ".pth", ".bin"}


def newest_checkpoint(output_dir: Path, last_file: str = TRAINER_FILE) -> Path | None:
    """The newest whole checkpoint, None if there is none; warns of damaged ones that are newer.

    Args:
        last_file: The file that is written last into a checkpoint.
    """
    found = contract.checkpoints(output_dir)
    for checkpoint in reversed(found):
        damage = damage_of(checkpoint, last_file)
        if not damage:
            return checkpoint
        logger.warning("%s is damaged (%s); an older checkpoint is used, if there is one", checkpoint, damage)
    if found:
        logger.warning("%s holds no checkpoint that is whole; training begins from the start", output_dir)
    return None


def damage_of(checkpoint: Path, last_file: str = TRAINER_FILE) -> str:
    """What is wrong with a checkpoint that a crash has left; empty if it is whole."""
    for name in dict.fromkeys((TRAINER_FILE, last_file)):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    cut = [file for file in sorted(checkpoint.rglob("*")) if file.is_file() and not is_whole(file)]
    return f"{cut[0].relative_to(checkpoint)} is cut" if cut else ""


def is_whole(file: Path) -> bool:
    """Whether a file has its whole length; its content is not read.

    JSON parses; the header of a safetensors file agrees with the file's size; what torch has saved is a whole zip
    archive; any other file is not empty.
    """
    if file.suffix == ".json":
        return _parses(file.read_bytes())
    if file.suffix in _ZIPPED:
        return zipfile.is_zipfile(file)
    if file.suffix == ".safetensors":
        return _has_its_length(file)
    return file.stat().st_size > 0


def _parses(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _has_its_length(file: Path) -> bool:
    try:
        read_header(file)
    except UserError:
        return False
    return True


def what_is_left(output_dir: Path, last_file: str = TRAINER_FILE) -> str:
    """The newest checkpoint of a run that stops, in words."""
    newest = newest_checkpoint(output_dir, last_file)
    left = f"the last good checkpoint is {newest.name}" if newest else "there is no checkpoint yet"
    return f"{left} in {output_dir}"
