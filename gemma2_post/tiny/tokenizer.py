"""The tokenizer of the tiny world: a small vocabulary in which the control tokens keep Gemma's ids."""

import json
from itertools import islice
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gemma2_post.tiny.corpus import documents

VOCAB_SIZE = 1024
_UNUSED = [f"<unused{number}>" for number in range(102)]
_SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", *_UNUSED, "<start_of_turn>", "<end_of_turn>"]
_PRINTABLE_ASCII = [chr(code) for code in range(33, 127)]


def train_tokenizer(num_documents: int = 2000) -> PreTrainedTokenizerFast:
    """BPE over the pretraining text; as in Gemma, spaces are `▁`, each digit is a token, and `<bos>` comes first.

    The vocabulary covers printable ASCII, so a person can type anything; other characters are `<unk>`.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[A-Za-z]+|▁?\d|▁|\n|[^A-Za-z\d▁\n]"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=["▁", "\n", *_PRINTABLE_ASCII],
        show_progress=False,
    )
    roles = ["user\nmodel\n"] * num_documents  # words of the chat template that are not in the text
    tokenizer.train_from_iterator([*islice(documents(Random(0)), num_documents), *roles], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        padding_side="left",
    )


def write_tokenizer_config(directory: Path) -> None:
    """Writes `tokenizer_config.json` in words that transformers 4 and 5 understand; version 5 writes its own."""
    config = {
        "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "model_max_length": int(1e30),
        "pad_token": "<pad>",
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_sentencepiece(directory: Path) -> None:
    """Adds what Google's models have, and llama.cpp needs: `tokenizer.model`, and `added_tokens_decoder`.

    The ids are those of `tokenizer.json`, where the pieces stand in the order of their merges: an id is a rank, too.
    """
    from sentencepiece import sentencepiece_model_pb2 as sentencepiece  # of the extra `export`

    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    pieces = {number: piece for piece, number in tokenizer["model"]["vocab"].items()}
    pieces |= {number: token["content"] for number, token in added.items()}
    model = sentencepiece.ModelProto()  # type: ignore[attr-defined]  # protobuf makes its classes at run time
    kinds = type(model).SentencePiece
    special = {"<unk>": kinds.UNKNOWN, "<pad>": kinds.CONTROL, "<eos>": kinds.CONTROL, "<bos>": kinds.CONTROL}
    has_bytes = "<0x08>" in pieces.values()
    for number, piece in sorted(pieces.items()):
        text = "<0x09>" if piece == "\t" and has_bytes else piece  # Gemma's file has the byte, transformers the tab
        kind = kinds.USER_DEFINED if number in added else kinds.BYTE if text.startswith("<0x") else kinds.NORMAL
        score = 0.0 if number in added else -float(number)
        model.pieces.add(piece=text, score=score, type=special.get(text, kind))
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size = type(trainer).BPE, len(pieces)
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = 0, 1, 2, 3
    trainer.byte_fallback = has_bytes
    normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = "identity", False, False
    (directory / "tokenizer.model").write_bytes(model.SerializeToString(deterministic=True))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(token.pop("id")): token for token in tokenizer["added_tokens"]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
