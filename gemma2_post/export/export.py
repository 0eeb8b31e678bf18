"""A finished model for the programs that people run: llama.cpp (GGUF), Ollama, vLLM.

gemma2-post export runs/tiny/warp --to gguf --type q8_0
gemma2-post export runs/tiny/warp --to ollama
gemma2-post export runs/tiny/warp --to vllm
"""

import shlex
import shutil
from pathlib import Path

from transformers import Gemma2Config

from gemma2_post.export.comparison import compare
from gemma2_post.export.conversion import check_convertible, check_extra, convert
from gemma2_post.export.modelfile import modelfile
from gemma2_post.models.folder import is_hub_name
from gemma2_post.models.loading import load_config
from gemma2_post.models.tokenizer import load_tokenizer
from gemma2_post.models.tokens import STOP_TOKEN_IDS
from gemma2_post.stage import contract
from gemma2_post.stage.disk import check_folder
from gemma2_post.stage.errors import UserError, located


def export(directory: str, to: str, weight_type: str | None, output: Path | None) -> None:
    """Writes a model for another program, and checks what it wrote against the model; for vLLM says how to serve it.

    Args:
        to: "gguf": a file; "ollama": a folder with that file and a Modelfile; "vllm": nothing is written.
        weight_type: One of `conversion.TYPES`; None for bf16.
        output: The file or folder to write; None: beside the model's folder, named after it.

    Raises:
        UserError: This cannot be exported, or what was written differs from the model.
    """
    with located("export"):
        if to == "vllm":
            if weight_type or output:
                raise UserError("--type and --output are for gguf and ollama; vllm serves the folder as it is")
            _check_model(directory)
            print(f"vLLM serves this folder as it is:\n\n  {vllm_command(directory)}")
            return
        check_extra()
        config = _check_model(directory)
        weight_type = weight_type or "bf16"
        folder = Path(directory)
        name = folder.resolve().name
        file_name = f"{name}-{weight_type}.gguf"
        output = output or folder.resolve().parent / (file_name if to == "gguf" else f"{name}-ollama")
        _check_output(output)
        check_convertible(folder, output, weight_type)
        temporary = output.with_name(f".{output.name}.tmp")
        contract.discard(temporary)
        temporary.mkdir(parents=True)
        try:
            print(f"{output}: converting {directory} to {weight_type} ...", flush=True)
            convert(folder, temporary / file_name, weight_type, name)
            print(f"{output}: comparing it with the model ...", flush=True)
            print(f"{output}: {compare(folder, config, temporary / file_name, weight_type)}")
            if to == "gguf":
                (temporary / file_name).rename(output)
            else:
                contract.write_text(temporary / "Modelfile", modelfile(file_name, config.max_position_embeddings))
                temporary.rename(output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    if to == "gguf":
        print(f"to use it: llama-server --model {shlex.quote(str(output))} --jinja")
    else:
        print(f"to use it: ollama create {name.lower()} --file {shlex.quote(str(output / 'Modelfile'))}")


def vllm_command(directory: str) -> str:
    """The command by which vLLM serves a folder, from which it reads the chat template, too.

    Raises:
        UserError: The folder does not name both stop tokens, so that answers would not end.
    """
    stops = (contract.read_json(Path(directory) / "generation_config.json", {}) or {}).get("eos_token_id")
    if stops != STOP_TOKEN_IDS:
        raise UserError(
            f"the generation_config.json of {directory} has the eos_token_id {stops}; write {STOP_TOKEN_IDS} there, "
            "<eos> and <end_of_turn>"
        )
    return f"vllm serve {shlex.quote(directory)} --dtype bfloat16"


def _check_model(directory: str) -> Gemma2Config:
    """The config of a finished language model in a folder that holds all that serving needs."""
    if is_hub_name(directory):
        raise UserError(
            f"there is no folder {directory}; export reads a folder: the output of a stage, or a Hub model after "
            f"hf download {directory} --local-dir DIR"
        )
    config = load_config(directory)
    load_tokenizer(directory, config)
    folder = Path(directory)
    tokenizer_config = contract.read_json(folder / "tokenizer_config.json", {}) or {}
    if not (folder / "chat_template.jinja").is_file() and not tokenizer_config.get("chat_template"):
        raise UserError(f"{directory} has no chat template; name the output of a stage, or a chat model (-it)")
    return config


def _check_output(output: Path) -> None:
    """Refuses what is there already, what cannot be written, and the output of a stage, whose files are sealed."""
    if output.exists():
        raise UserError(f"{output} is there already; delete it, or name another place with --output")
    for parent in output.absolute().parents:
        if (parent / contract.DONE).is_file() or (parent / contract.BEGUN).is_file():
            raise UserError(f"{output} is inside the output of a stage; name another place with --output")
    check_folder(output.parent, "--output")
