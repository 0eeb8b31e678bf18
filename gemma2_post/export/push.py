"""A finished model to the Hugging Face Hub: its weights, tokenizer, and card, and nothing that names this machine.

gemma2-post push runs/tiny/warp USER/NAME
gemma2-post push runs/tiny USER/NAME --public
"""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (  # HTTPError is of the HTTP library that this version uses
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from gemma2_post.models.folder import (
    ADAPTER,
    TEMPLATE,
    TOKENIZER_FILES,
    files_of,
    is_hub_name,
    open_folder,
    read_object,
)
from gemma2_post.stage import card, contract
from gemma2_post.stage.disk import REPLACED
from gemma2_post.stage.errors import UserError, located

_CONFIGS = ["config.json", "generation_config.json", "model.safetensors.index.json"]


def push(directory: Path, repository: str, is_public: bool) -> None:
    """Uploads a model in one commit.

    Args:
        directory: The output of a stage, or a run, of which the last model is uploaded.
        repository: `USER/NAME` on the Hub; made if it is not there yet.
        is_public: Whether everyone can see a repository that is made for it.

    Raises:
        UserError: The folder has no finished model, a file of it names a folder of this machine, or the Hub refuses.
    """
    with located("push"):
        folder = _model_of(directory)
        files = _files(folder)
        _check_private(folder, files)
        api = HfApi()
        try:
            name = api.create_repo(repository, private=not is_public, exist_ok=True).repo_id
            print(f"{folder}: uploading {len(files)} files to {name} ...", flush=True)
            commit = api.upload_folder(
                folder_path=folder,
                repo_id=name,
                allow_patterns=files,
                commit_message=f"{folder.resolve().name}, made by gemma2_post",
            )
        except (HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, HTTPError) as error:
            raise _refused(repository, error) from error
    print(f"it is at {commit.repo_url}")


def _model_of(directory: Path) -> Path:
    """The folder itself if it holds a model; of a run, that of the language model with the most stages behind it."""
    if (directory / "config.json").is_file() or not directory.is_dir():
        return directory
    models = {}
    for file in sorted(directory.rglob(contract.DONE)):
        config, is_replaced = file.parent / "config.json", REPLACED in file.relative_to(directory).parts
        if (
            not is_replaced
            and config.is_file()
            and "Gemma2ForCausalLM" in read_object(config).get("architectures", [])
        ):
            models[file.parent] = len(card.chain(file.parent))
    last = [folder for folder, length in models.items() if length == max(models.values())]
    if not last:
        raise UserError(f"{directory} has no finished model; name the output of a stage, or a run that has some")
    if len(last) > 1:
        names = ", ".join(map(str, last))
        raise UserError(f"{directory} ends in {len(last)} models; name one of them: {names}")
    return last[0]


def _files(folder: Path) -> list[str]:
    """What makes up the model, relative to its folder; an adapter only if others can get its base."""
    open_folder(str(folder))
    if not (folder / card.NAME).is_file():
        raise UserError(f"{folder} has no {card.NAME}, the model card; name the output of a stage or of a merge")
    names = [*_CONFIGS, *TOKENIZER_FILES, TEMPLATE, card.NAME]
    found = [name for name in names if (folder / name).is_file()] + [file.name for file in files_of(folder)]
    adapter = folder / "adapter"
    if (adapter / ADAPTER).is_file() and is_hub_name(str(read_object(adapter / ADAPTER)["base_model_name_or_path"])):
        found += [f"adapter/{file.name}" for file in sorted(adapter.iterdir())]
    return found


def _check_private(folder: Path, files: list[str]) -> None:
    """Refuses text that names the user's home folder, or the one that the model lies in."""
    private = {str(Path.home()), str(folder.resolve().parent)} - {"/"}
    for name in files:
        if not name.endswith(".safetensors"):
            content = (folder / name).read_bytes()
            if found := [path for path in sorted(private) if path.encode() in content]:
                raise UserError(
                    f"{folder / name} contains {found[0]}, a folder of this machine; remove it there first"
                )


def _refused(repository: str, error: Exception) -> UserError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, HFValidationError):
        return UserError(f"{repository} is no name of a repository ({error}); write USER/NAME")
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return UserError("you are not logged in to the Hub; run hf auth login with a token that may write")
    if status == 403:
        return UserError(f"your token may not write to {repository}; run hf auth login with one that may")
    if isinstance(error, OfflineModeIsEnabled):
        return UserError("HF_HUB_OFFLINE is set; unset it to reach the Hub")
    reason = " ".join(str(error).split())[:200]
    return UserError(f"the Hub did not take {repository} ({reason}); run the same command again to go on")
