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
_SUFFIXES = {".py", ".safetensors", ".bin", ".jinja", ".model", ".yaml", ".gz", ".zst", *DATA_SUFFIXES}
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


def of_hub(name: str, revision: str | None, is_dataset: bool) -> dict[str, str] | None:
    """Content hashes by file of a model or data set on the Hub; of those that are cached, if it cannot be reached.

    None if it is not a Hub name, or is neither on the Hub nor in the cache; the stage itself reports that.
    """
    if not _HUB_NAME.fullmatch(name) or Path(name).parent.exists():
        return None
    from huggingface_hub import HfApi, snapshot_download

    kind = "dataset" if is_dataset else "model"
    with contextlib.suppress(Exception):  # no network, no such name, no access: each transport has its own errors
        info = HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=10, files_metadata=True)
        files = [file for file in getattr(info, "siblings", None) or [] if _is_read(file.rfilename)]
        return {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in files}
    try:
        folder = Path(snapshot_download(name, revision=revision, repo_type=kind, local_files_only=True))
    except OSError:
        return None
    # In the cache a file is a link to a blob, whose name is its hash.
    cached = sorted(path for path in folder.rglob("*") if path.is_symlink() and _is_read(path.name))
    return {path.relative_to(folder).as_posix(): path.resolve().name for path in cached}


def _is_read(file: str) -> bool:
    """Whether a file of a repository is weights, a config, a tokenizer or data; a README or an image is not."""
    return Path(file).suffix in _SUFFIXES


def num_cores() -> int:
    """The cores that this process may use: fewer than the machine has under an affinity mask or in a Slurm job."""
    return len(os.sched_getaffinity(0))


def files_in(directory: Path) -> list[Path]:
    """The files of a directory that count: no checkpoints, no logs, nothing that Python leaves behind."""
    return sorted(path for path in directory.iterdir() if path.is_file() and _is_read(path.name))


def of_files(files: list[Path]) -> str:
    """Hash of the names and contents of files."""
    with ThreadPoolExecutor(num_cores()) as pool:
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
