"""Gemma 2's tokenizer and chat format: loading, checking, saving, rendering."""

import json
from pathlib import Path

import numpy as np
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, Gemma2Config, PreTrainedTokenizerBase
from trl import ModelConfig

from gemma2_post.models.arguments import check_lora_modules
from gemma2_post.models.folder import TOKENIZER_FILES, copy_tokenizer, is_hub_name
from gemma2_post.models.loading import load_config, load_error
from gemma2_post.models.templates import INFERENCE_TEMPLATE, TRAINING_TEMPLATE
from gemma2_post.models.tokens import SPECIAL_TOKENS
from gemma2_post.stage import digests
from gemma2_post.stage.errors import UserError


def load_tokenizer(path: str, config: Gemma2Config, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer with the Gemma 2 chat template, checked against Gemma's ids and the model's vocabulary size."""
    folder = Path(path)
    try:
        if is_hub_name(path):  # all of its files, of which transformers would load some
            folder = Path(snapshot_download(path, revision=revision, allow_patterns=[*TOKENIZER_FILES, "config.json"]))
    except OSError as error:
        raise load_error(path, error) from error
    # Without this file, transformers silently builds a GemmaTokenizer of five tokens.
    if folder.is_dir() and not (folder / "tokenizer.json").is_file():
        raise UserError(f"{path} has no tokenizer.json; copy the base model's tokenizer files there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except OSError as error:
        raise load_error(path, error) from error
    except Exception as error:  # the tokenizers library raises its errors as plain Exception
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the tokenizer of {path} is cut or damaged ({reason}); copy its files again") from error
    if len(tokenizer) != config.vocab_size:
        raise UserError(
            f"the tokenizer in {path} has {len(tokenizer)} tokens and the model {config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    vocabulary = tokenizer.get_vocab()
    for token, expected in SPECIAL_TOKENS.items():
        if vocabulary.get(token) != expected:
            raise UserError(
                f"the tokenizer in {path} has {token} at id {vocabulary.get(token)}, not {expected}; "
                "use a Gemma 2 tokenizer"
            )
    _check_control_tokens(path, tokenizer)
    tokenizer.chat_template = INFERENCE_TEMPLATE
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token = "<pad>", "<eos>", "<bos>"
    return tokenizer


def _check_control_tokens(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that reads a control token inside a text as anything else than its one id.

    That happens where the token is in the vocabulary, but is not an *added* token, or removes the newline beside it.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    newline = encode("\n")
    for token, token_id in SPECIAL_TOKENS.items():
        expected, found = [*newline, token_id, *newline], encode(text := f"\n{token}\n")
        if found != expected:
            read, wanted = (" ".join(map(repr, tokenizer.convert_ids_to_tokens(ids))) for ids in (found, expected))
            raise UserError(
                f"the tokenizer in {path} reads {text!r} as {read}, not as {wanted}; copy tokenizer.json and "
                "tokenizer_config.json of the base model there, where that is one added token"
            )


def load_config_and_tokenizer(model_args: ModelConfig) -> tuple[Gemma2Config, PreTrainedTokenizerBase]:
    """Config and tokenizer of the model that a recipe names, checked; reads no weights."""
    path, revision = model_args.model_name_or_path, model_args.model_revision
    config = load_config(path, revision)
    if model_args.use_peft:
        check_lora_modules(model_args, config)
    return config, load_tokenizer(path, config, revision)


def check_same_vocabulary(
    tokenizer: PreTrainedTokenizerBase, student: str, teacher_tokenizer: PreTrainedTokenizerBase, teacher: str
) -> None:
    """Refuses a teacher that assigns an id to another token than the student does; TRL compares only sizes.

    Args:
        student: Path of the student, for the error.
        teacher: Path of the teacher, for the error.
    """
    ours, theirs = (
        {token_id: token for token, token_id in each.get_vocab().items()} for each in (tokenizer, teacher_tokenizer)
    )
    for token_id in sorted(ours.keys() | theirs.keys()):
        if ours.get(token_id) != theirs.get(token_id):
            raise UserError(
                f"id {token_id} is {ours.get(token_id)!r} to the student {student} and "
                f"{theirs.get(token_id)!r} to the teacher {teacher}; choose a teacher with the same vocabulary"
            )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all tokens with their ids."""
    return digests.of_text(json.dumps(sorted(tokenizer.get_vocab().items())))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, output_dir: Path) -> None:
    """Copies the tokenizer's files, and writes its chat template as the only one.

    What transformers 5 would write lacks `tokenizer.model` and `added_tokens_decoder`, which llama.cpp needs, and
    cannot be read by transformers 4.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(Path(tokenizer.name_or_path), output_dir, tokenizer.chat_template)


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[dict[str, str]]],
    trained: list[list[bool]] | None = None,
) -> dict[str, list[np.ndarray]]:
    """Conversations for training: `input_ids` and `labels` (-100 where there is no loss), int32, of equal length.

    Args:
        trained: For each message of each conversation, whether the model's turn counts in the loss; None for all.
    """
    trained = trained or [[True] * len(messages) for messages in conversations]
    turns = [
        [{**message, "trained": flag} for message, flag in zip(messages, flags, strict=True)]
        for messages, flags in zip(conversations, trained, strict=True)
    ]
    encoded = tokenizer.apply_chat_template(
        turns,
        chat_template=TRAINING_TEMPLATE,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_attention_mask": False},
    )
    input_ids = [np.array(ids, np.int32) for ids in encoded["input_ids"]]
    masks = [np.array(mask, bool) for mask in encoded["assistant_masks"]]
    return {
        "input_ids": input_ids,
        "labels": [np.where(mask, ids, -100) for ids, mask in zip(input_ids, masks, strict=True)],
    }
