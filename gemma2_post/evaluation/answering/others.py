"""Models of any family that answer beside the chain's: behind an endpoint, or here with their own chat format.

Each answer is appended to a file as it comes, by what decides it, so that no run asks for it twice.
"""

import gc
import json
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from gemma2_post.data.turns import Message
from gemma2_post.evaluation.answering import endpoint
from gemma2_post.evaluation.answering.endpoint import Completion, Endpoint, RefusedError, Request
from gemma2_post.evaluation.answering.partly import Other, Sample
from gemma2_post.evaluation.answering.samples import Answer, sample_answers
from gemma2_post.evaluation.keys import EndpointArguments, OtherArguments, OtherModel
from gemma2_post.evaluation.measure import Measurement, as_answer, digest_of
from gemma2_post.stage import contract, digests
from gemma2_post.stage.errors import UserError, located

logger = logging.getLogger(__name__)

RETRIES = 10
"""Additional attempts to ask an endpoint."""
_RECORD: contract.Keys = {"key": str, "text": str, "has_ended": bool}
Write = Callable[[int, str, bool], None]
"""Takes the number of a prompt, the answer, and whether it ended by itself."""
Answering = Callable[[list[list[Message]], float, Write], None]
"""Answers prompts at a temperature."""


def load_others(args: OtherArguments, names: list[str], measurement: Measurement, file: Path) -> dict[str, Other]:
    """How each other model answers, by its name; endpoints are asked whether they are there.

    Args:
        names: The names of the compared models.
        file: File for all their answers.

    Raises:
        UserError: An endpoint cannot be reached, a model has no chat format, or a name is given twice.
    """
    found: dict[str, Other] = {}
    for each in args.others or []:
        with located(f"others: {each.name}"):
            if each.name in (*names, *found):
                raise UserError("two models have this name; choose another one")
            length, seed = measurement.args.max_completion_length, measurement.args.seed
            if each.endpoint:
                key = EndpointArguments(each.api_key_variable)
                client = endpoint.connect(each.endpoint, key, RETRIES)
                endpoint.check(client)
                server = Endpoint(client, each.model)
                loaded = partial(_by_endpoint, server, each.name, length, seed, args.other_concurrency)
            else:
                tokenizer, batch_size = _tokenizer(each.model), measurement.args.batch_size
                loaded = partial(_by_model, each.model, tokenizer, length, seed, batch_size)
            found[each.name] = partial(_cached, loaded, each, measurement, file)
    return found


@contextmanager
def _cached(
    loaded: Callable[[], AbstractContextManager[Answering]], other: OtherModel, measurement: Measurement, file: Path
) -> Iterator[Sample]:
    """Takes from the file what it has, and appends to it what it has not."""
    model = other.model if other.endpoint else digest_of(Path(other.model))

    def sample(prompts: list[list[Message]], temperature: float) -> list[Answer]:
        decisive = [other.endpoint, model, measurement.sampling, temperature]
        keys = [digests.of_text(json.dumps([decisive, prompt])) for prompt in prompts]
        file.parent.mkdir(exist_ok=True)
        records = contract.read_lines(file, _RECORD)
        known = {each["key"]: as_answer(measurement.tokenizer, each["text"], each["has_ended"]) for each in records}
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in known}
        asked = list(missing)

        with tqdm(total=len(asked), desc=other.name, unit="answer", disable=not asked) as bar:

            def write(number: int, text: str, has_ended: bool) -> None:
                record = {"key": asked[number], "model": other.name, "text": text, "has_ended": has_ended}
                contract.append_lines(file, [record])
                known[asked[number]] = as_answer(measurement.tokenizer, text, has_ended)
                bar.update()

            if asked:
                with located(f"others: {other.name}"):
                    answering(list(missing.values()), temperature, write)
        return [known[key] for key in keys]

    with loaded() as answering:
        yield sample


@contextmanager
def _by_endpoint(server: Endpoint, name: str, length: int, seed: int, concurrency: int) -> Iterator[Answering]:
    """A refused prompt has an empty answer, with a warning."""

    def answering(prompts: list[list[Message]], temperature: float, write: Write) -> None:
        requests = [
            Request(
                f"prompt {prompt[-1]['content'][:40]!r}",
                prompt,
                temperature,
                length,
                seed=random.Random(f"{seed} {json.dumps(prompt)}").getrandbits(31),
            )
            for prompt in prompts
        ]

        refused: list[RefusedError] = []

        def write_one(number: int, said: Completion | RefusedError) -> None:
            if isinstance(said, RefusedError):
                refused.append(said)
                write(number, "", True)
            else:
                write(number, said.text, said.finish_reason != "length")

        server.answer_all(requests, concurrency, write_one)
        if refused:
            logger.warning("%s refused %d of %d prompts (%s)", name, len(refused), len(prompts), refused[0])

    yield answering


def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a chat model of any family.

    Raises:
        UserError: The model has no chat format.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        raise UserError(f"{path} has no chat template, so it is no chat model; name one that is tuned for chats")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


@contextmanager
def _by_model(
    path: str, tokenizer: PreTrainedTokenizerBase, length: int, seed: int, batch_size: int
) -> Iterator[Answering]:
    """A model of transformers with its own tokenizer; it is loaded when it is first asked."""

    @cache
    def model() -> Any:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        device_map = "balanced" if torch.cuda.device_count() > 1 else {"": device}
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device_map).eval()

    def answering(prompts: list[list[Message]], temperature: float, write: Write) -> None:
        stops = model().generation_config.eos_token_id or tokenizer.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        for start in range(0, len(prompts), batch_size):
            batch, pad = prompts[start : start + batch_size], tokenizer.pad_token_id
            sampled = sample_answers(
                model(), tokenizer, batch, length, temperature, batch_size, seed + start, stops, pad
            )
            for i, each in enumerate(sampled):
                write(start + i, each.text, each.token_ids[-1] in stops)

    yield answering
    model.cache_clear()
    gc.collect()
