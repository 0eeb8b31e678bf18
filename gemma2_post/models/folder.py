"""Opens a model's folder without reading its weights: what is damaged or does not fit is said in one sentence.

Every stage, the merge tool and chat open models through here. Nothing here imports torch or transformers.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from gemma2_post.models.shapes import LM_HEAD, SCORE_HEAD, tensor_shapes
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError

WEIGHTS = "model.safetensors"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENIZER_FILES = [
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json")
]
"""What a tokenizer may consist of, without its chat template."""
TEMPLATE = "chat_template.jinja"
LANGUAGE_MODEL, REWARD_MODEL = "a language model", "a reward model"
_ARCHITECTURES = {"Gemma2ForCausalLM": LANGUAGE_MODEL, "Gemma2ForSequenceClassification": REWARD_MODEL}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_FLOATS = {"F64", "F32", "F16", "BF16"}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelFolder:
    """The folder of a whole model, opened."""

    path: str
    config: dict[str, Any]
    """The content of its config.json."""
    shapes: dict[str, Shape]
    """Shapes of its tensors, by name."""


def open_folder(path: str) -> ModelFolder:
    """A whole model's folder, with every file of it that must be whole.

    Raises:
        UserError: It is no folder of a finished, unquantized model, or one of its files is damaged.
    """
    check_folder(path)
    folder = Path(path)
    if not (folder / "config.json").is_file():
        if (folder / ADAPTER).is_file():
            raise UserError(f"{path} is an adapter, not a model; merge it into its base first, or name a merged model")
        raise UserError(f"{path} has no config.json; name the output of a finished stage or a Hub model")
    config = read_object(folder / "config.json")
    if config.get("quantization_config"):
        raise UserError(f"{path} is quantized; name the unquantized model and set load_in_4bit instead")
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            read_object(folder / name)
    opened = ModelFolder(path, config, read_shapes(folder))
    if config.get("model_type") == "gemma2":
        check_shapes(opened)
    return opened


def check_folder(path: str) -> None:
    """Refuses what is no folder, or the output of a stage that is not finished."""
    folder = Path(path)
    if not path.strip() or not folder.is_dir():
        raise _no_folder(path)
    if (folder / contract.BEGUN).is_file() and not (folder / contract.DONE).is_file():
        raise UserError(f"{path} is not finished; run the stage that makes it to its end")
    contract.read_done(folder, "stage")  # raises if it is damaged


def _no_folder(path: str) -> UserError:
    if not path.strip():
        return UserError("the name of a model is empty; name a model's folder or a Hub model")
    if "://" in path:
        hint = path.split("://")[1].partition("/")[2] if "huggingface.co/" in path else "a Hub model"
        return UserError(f"{path} is a URL; name the model itself ({hint}), or a folder")
    if Path(path).exists():
        return UserError(f"{path} is a file; name the folder of a model")
    return UserError(f"there is no folder {path}; name a model's folder or a Hub model")


def is_hub_name(path: str) -> bool:
    """Whether a text can be the name of a model on the Hub, `organization/model`."""
    return bool(_HUB_NAME.fullmatch(path)) and not Path(path).exists()


def absolute(path: str) -> str:
    """The absolute path of a local model; the name of one on the Hub as it is."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model, which must exist."""
    found: dict[str, Any] = contract.read_json(file, keys={}, advice="get it again")
    return found


def copy_tokenizer(source: Path, output_dir: Path, template: str | None = None) -> None:
    """Copies a tokenizer's files byte for byte, but leaves only one chat template.

    Of two, llama.cpp's converter would read the one in `tokenizer_config.json`, transformers the one beside it.

    Args:
        template: The chat template to write; None for the folder's own.
    """
    for file in [source / name for name in [*TOKENIZER_FILES, TEMPLATE]]:
        if file.is_file():
            shutil.copyfile(file, output_dir / file.name)
    if template is not None:
        contract.write_text(output_dir / TEMPLATE, template)
    config = output_dir / "tokenizer_config.json"
    if (output_dir / TEMPLATE).is_file() and config.is_file() and "chat_template" in (content := read_object(config)):
        contract.write_json(config, {key: value for key, value in content.items() if key != "chat_template"})


# --- weights ---


def files_of(folder: Path, file: str = WEIGHTS) -> list[Path]:
    """A folder's file of weights, or its shards by their index.

    Raises:
        UserError: A file is missing, or the index is damaged.
    """
    index = folder / f"{file}.index.json"
    names = [file]
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index} has no weight_map; get it again")
        names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; name a folder with all weights in safetensors")
    return [folder / name for name in names]


def read_shapes(folder: Path, file: str = WEIGHTS) -> dict[str, Shape]:
    """The shapes of all tensors in a folder's file of weights, or in its shards, from their headers.

    Raises:
        UserError: A file is missing, cut or damaged, or the weights are quantized.
    """
    shapes: dict[str, Shape] = {}
    for each in files_of(folder, file):
        header = read_header(each)
        if others := [(name, dtype) for name, (dtype, _) in header.items() if dtype not in _FLOATS]:
            raise UserError(
                f"{each}: {others[0][0]} is {others[0][1]}, not a floating-point tensor; name the unquantized model"
            )
        shapes |= {name: shape for name, (_, shape) in header.items()}
    index = folder / f"{file}.index.json"
    if index.is_file() and (missing := sorted(read_object(index)["weight_map"].keys() - shapes.keys())):
        raise UserError(f"{index} names {missing[0]}, which is in no shard; get the model again")
    return shapes


def read_header(file: Path) -> dict[str, tuple[str, Shape]]:
    """The dtypes and shapes of the tensors in a safetensors file, by name; reads no data.

    The file is 8 bytes of length, a JSON object, then the data, which must have the length that the object states.

    Raises:
        UserError: The file is cut or damaged.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if 0 < length <= size - 8 else b""
    try:
        header = json.loads(text)
        tensors = {name: each for name, each in header.items() if name != "__metadata__"}
        found = {name: (str(each["dtype"]), tuple(map(int, each["shape"]))) for name, each in tensors.items()}
        end = max((int(each["data_offsets"][1]) for each in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: it is cut off or damaged; get it again") from error
    if size != 8 + length + end:
        raise UserError(
            f"{file} cannot be read: it has {size:,} bytes and should have {8 + length + end:,}; get it again"
        )
    return found


def tensor_digest(folder: Path, name: str) -> str:
    """Content hash of one tensor in a folder's weights, whatever is beside it.

    Raises:
        UserError: The weights are missing, damaged, or have no such tensor.
    """
    for file in files_of(folder):
        if name in read_header(file):
            with open(file, "rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                begin, end = json.loads(stream.read(length))[name]["data_offsets"]
                stream.seek(8 + length + begin)
                return xxhash.xxh3_64_hexdigest(stream.read(end - begin))
    raise UserError(f"{folder} has no {name}; get it again")


# --- does it fit ---


def check_shapes(folder: ModelFolder) -> None:
    """Refuses weights that are not those of a Gemma 2 config: transformers would fill or drop tensors silently."""
    expected = tensor_shapes(folder.config, folder.path)
    for name, shape in expected.items():
        if name not in folder.shapes:
            raise UserError(f"{folder.path} lacks the tensor {name}, which its config needs; get the model again")
        if folder.shapes[name] != shape:
            raise UserError(
                f"{folder.path}: {name} has the shape {list(folder.shapes[name])}, and its config.json says "
                f"{list(shape)}; the files belong to different models"
            )
    for name in folder.shapes:
        if name not in expected and name not in (LM_HEAD, SCORE_HEAD) and not name.endswith("rotary_emb.inv_freq"):
            raise UserError(f"{folder.path} has the tensor {name}, which no Gemma 2 has; name a plain model")


def check_kind(folder: ModelFolder, wanted: str) -> None:
    """Refuses a reward model where a language model is wanted, and the other way around.

    Args:
        wanted: `LANGUAGE_MODEL` or `REWARD_MODEL`.
    """
    named = folder.config.get("architectures") or ["Gemma2ForCausalLM"]
    kind = _ARCHITECTURES.get(str(named[0]), f"a {named[0]}") if isinstance(named, list) and named else "of no kind"
    kind = REWARD_MODEL if SCORE_HEAD in folder.shapes else kind
    if kind != wanted:
        remedy = "the output of the reward stage" if wanted == REWARD_MODEL else wanted
        raise UserError(f"{folder.path} is {kind}, not {wanted}; name {remedy}")
