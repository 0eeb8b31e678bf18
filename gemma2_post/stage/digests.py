"""Content hashes of files, model folders, packages of functions, a stage's code, and texts.

They tell versions apart at memory speed, on all cores; only the hashes of texts are cryptographic.
"""

import contextlib
import glob
import hashlib
import importlib.util
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import xxhash

_PACKAGE = Path(__file__).parents[1]
_COMPRESSIBLE = [".json", ".jsonl", ".ndjson", ".csv", ".txt"]
DATA_SUFFIXES = [
    *_COMPRESSIBLE,
    ".parquet",
    *(f"{suffix}{how}" for suffix in _COMPRESSIBLE for how in (".gz", ".zst")),
]
"""How the names of data files end."""
_SUFFIXES = {".py", ".safetensors", ".jinja", ".model", ".yaml", ".gz", ".zst", *DATA_SUFFIXES}
_IMPORT = re.compile(r"^ *(?:from ([.\w]+) )?import (\([^)]*\)|[^#\n]*)", re.MULTILINE)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def of_input(path: str) -> str | None:
    """Hash of a file, a directory, a glob's files, or the package of a `module:function`; None for anything else."""
    if Path(path).is_dir():
        return of_files(files_in(Path(path)))
    if Path(path).is_file():
        return of_files([Path(path)])
    if files := [Path(name) for name in sorted(glob.glob(path, recursive=True)) if Path(name).is_file()]:
        return of_files(files)
    module, colon, _ = path.partition(":")
    if colon and all(part.isidentifier() for part in module.split(".")):
        with contextlib.suppress(ModuleNotFoundError):
            spec = importlib.util.find_spec(module)
            if spec and spec.origin:
                return of_files(sorted(Path(spec.origin).parent.glob("*.py")))
    return None


def of_hub(name: str, revision: str | None, is_dataset: bool) -> str | None:
    """Commit of a model or data set on the Hub; of the cached download if the Hub cannot be reached.

    None if it is not a Hub name, or is neither on the Hub nor in the cache; the stage itself reports that.
    """
    if not _HUB_NAME.fullmatch(name) or Path(name).parent.exists():
        return None
    from huggingface_hub import HfApi, hf_hub_download

    kind = "dataset" if is_dataset else "model"
    with contextlib.suppress(Exception):  # no network, no such name, no access: each transport has its own errors
        return HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=10).sha
    # This file is always there, and its path in the cache contains the commit.
    file = ".gitattributes" if is_dataset else "config.json"
    try:
        found = hf_hub_download(name, file, revision=revision, repo_type=kind, local_files_only=True)
    except OSError:
        return None
    return Path(found).parent.name


def files_in(directory: Path) -> list[Path]:
    """The files of a directory that count: no checkpoints, no logs, nothing that Python leaves behind."""
    return sorted(path for path in directory.iterdir() if path.is_file() and path.suffix in _SUFFIXES)


def of_files(files: list[Path]) -> str:
    """Hash of the names and contents of files."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(_of_file, files)
    lines = [f"{file.name} {part}\n" for file, part in zip(files, parts, strict=True)]
    return xxhash.xxh3_64_hexdigest("".join(lines).encode())


def _of_file(file: Path) -> str:
    digest = xxhash.xxh3_128()
    block = memoryview(bytearray(1 << 20))  # small enough to stay in the CPU cache
    with open(file, "rb", buffering=0) as stream:
        while size := stream.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def of_text(text: str) -> str:
    """The first 16 hex digits of the SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def of_code(file: Path) -> str:
    """Hash of a module and of all modules of this package that it imports, directly or indirectly."""
    reached: set[Path] = set()
    to_visit = [file]
    while to_visit:
        if (current := to_visit.pop()) not in reached:
            reached.add(current)
            to_visit += imported(current)
    return of_files(sorted(reached))


@cache
def imported(file: Path) -> list[Path]:
    """The modules of this package that a module imports directly, by its text: parsing all takes a quarter second."""
    names: list[str] = []
    for module, imported in _IMPORT.findall(file.read_text(encoding="utf-8")):
        names += [module, *(f"{module}.{name}" for name in re.findall(r"\w+", imported))]
        names += [] if module else re.findall(r"[.\w]+", imported)
    paths = [_PACKAGE.parent.joinpath(*name.split(".")) for name in names if name.split(".")[0] == _PACKAGE.name]
    candidates = [file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py")]
    return [file for file in candidates if file.is_file()]
