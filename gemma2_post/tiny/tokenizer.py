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
