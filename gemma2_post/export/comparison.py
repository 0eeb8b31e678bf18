"""A GGUF file held against the model that it was made from: llama.cpp reads the one, transformers the other."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Gemma2Config, PreTrainedModel, PreTrainedTokenizerBase

from gemma2_post.models.loading import frozen_arguments, load_model
from gemma2_post.models.tokenizer import load_tokenizer
from gemma2_post.stage import digests
from gemma2_post.stage.errors import UserError

QUESTIONS = [
    "What is 3 plus 5?",
    "Write two sentences about the sea.",
    "What does this do?\n\ndef f(x):\n    return x",
]
"""What is asked of both; plain ASCII, which every vocabulary has."""
_UNICODE = "Grüße,\n\t你好  مرحبا 🙂"
"""Asked for its tokens only, where the vocabulary has a token for each byte."""
NUM_TOKENS, NUM_LIKELIEST = 24, 10
TOLERANCES = {"f32": 0.02, "f16": 0.05, "bf16": 0.25, "q8_0": 0.5}
"""Largest difference of a log-probability, by type. llama.cpp rounds the activations, too, to the type of the weights;
`docs/serving.md` has what was measured. A conversion that went wrong differs by several nats."""

Ask = Callable[[str, dict[str, Any]], dict[str, Any]]
"""A request to llama.cpp's server: a path and a body, to the answer."""


@dataclass(frozen=True)
class _Answer:
    """What llama.cpp says to a question, greedily."""

    prompt: list[int]
    tokens: list[int]
    likeliest: list[dict[int, float]]
    """For each token of the answer, the log-probabilities of the `NUM_LIKELIEST` likeliest tokens at its place."""


def compare(folder: Path, config: Gemma2Config, file: Path, weight_type: str) -> str:
    """What the comparison has found, in a sentence.

    Raises:
        UserError: They differ in the tokens of a chat, or by more than the type's rounding.
    """
    tokenizer = load_tokenizer(str(folder), config)
    answers = _answers(file, tokenizer, min(config.max_position_embeddings, 512))
    dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    model = load_model(frozen_arguments(str(folder), dtype), device_map="cpu")
    _compute_in_fp32(model)
    differences: list[float] = []
    num_equal = num_tokens = 0
    for answer in answers:
        input_ids = torch.tensor([answer.prompt + answer.tokens[:-1]])
        with torch.inference_mode():
            logits = model(input_ids, logits_to_keep=len(answer.tokens)).logits[0]
        log_probabilities = logits.log_softmax(-1)  # (tokens of the answer, vocabulary)
        num_equal += log_probabilities.argmax(-1).tolist() == answer.tokens
        num_tokens += len(answer.tokens)
        for ours, theirs in zip(log_probabilities, answer.likeliest, strict=True):
            differences += [abs(ours[token].item() - theirs[token]) for token in theirs]
    largest, mean = max(differences), sum(differences) / len(differences)
    found = (
        f"{num_equal} of {len(answers)} greedy answers equal; the log-probabilities of {len(differences):,} likely "
        f"tokens at {num_tokens} places differ by {mean:.2g} on average and {largest:.2g} at most"
    )
    if not largest <= TOLERANCES[weight_type]:
        raise UserError(f"the GGUF file is not the model: {found}, where up to {TOLERANCES[weight_type]} is rounding")
    return f"tokens of a chat equal; {found}"


def _compute_in_fp32(model: PreTrainedModel) -> None:
    """Lets a model on the CPU compute in fp32 with weights that stay as they are stored, but for one layer at a time.

    In bf16, its own rounding would be as large as what is measured; all of it in fp32 would take twice the memory.
    """
    stored = model.dtype

    def widen(module: nn.Module, _: object) -> None:
        module.float()

    def narrow(module: nn.Module, *_: object) -> None:
        module.to(stored)  # loses nothing: these are the values from before `widen`

    decoder = model.get_decoder()
    for module in (decoder.embed_tokens, *decoder.layers, decoder.norm, model.lm_head):
        module.register_forward_pre_hook(widen)
        module.register_forward_hook(narrow)


def _answers(file: Path, tokenizer: PreTrainedTokenizerBase, num_positions: int) -> list[_Answer]:
    """llama.cpp's answers to `QUESTIONS`, once its tokens of each chat are those of the tokenizer."""
    ask = _llama_cpp(file, num_positions)
    last = _UNICODE if "<0x00>" in tokenizer.get_vocab() else "What is my name?"
    turns = [("user", "Hello, I am Anna."), ("assistant", "Nice to meet you, Anna."), ("user", last)]
    _same_tokens([{"role": role, "content": content} for role, content in turns], ask, tokenizer)
    answers = []
    for question in QUESTIONS:
        prompt = _same_tokens([{"role": "user", "content": question}], ask, tokenizer)
        greedily = {"n_predict": NUM_TOKENS, "temperature": 0, "n_probs": NUM_LIKELIEST, "return_tokens": True}
        answer = ask("/completion", {"prompt": prompt} | greedily)
        # It reports no probabilities for a token that ends within a character: the answer counts up to there.
        pairs = zip(answer["tokens"], answer["completion_probabilities"], strict=False)
        places = [place for _, place in takewhile(lambda pair: pair[0] == pair[1]["id"], pairs)]
        likeliest = [{each["id"]: each["logprob"] for each in place["top_logprobs"]} for place in places]
        answers.append(_Answer(prompt, [place["id"] for place in places], likeliest))
    return answers


def _llama_cpp(file: Path, num_positions: int) -> Ask:
    """llama.cpp's server with this file, in this process; it ends with what is returned."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = num_positions, 1, 0
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = digests.num_cores()
    parameters.warmup, parameters.verbosity = False, 0
    parameters.hostnames, parameters.port = ["127.0.0.1"], 0  # any free port
    server = xllamacpp.Server(parameters)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy leads to this machine

    def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}{path}", json.dumps(body).encode(), headers)
        try:
            with opener.open(request) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            reason = " ".join(error.read().decode(errors="replace").split())[:300]
            raise UserError(f"llama.cpp reads the GGUF file and refuses {path} ({reason})") from error

    return ask


def _same_tokens(messages: list[dict[str, str]], ask: Ask, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a chat, for llama.cpp and for the tokenizer.

    Raises:
        UserError: They are not the same.
    """
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    text = ask("/apply-template", {"messages": messages})["prompt"]
    found = ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
    if found != expected:
        pairs = enumerate(zip(found, expected, strict=False))
        place = next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(found), len(expected)))
        raise UserError(
            f"llama.cpp reads a chat as other tokens than the tokenizer: {len(found)} for {len(expected)}, "
            f"{found[place : place + 8]} for {expected[place : place + 8]} from place {place} on; copy "
            "tokenizer.model, tokenizer.json and tokenizer_config.json from the base model"
        )
    return found
