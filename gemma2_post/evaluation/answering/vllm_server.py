"""Answers from vLLM: its server is started for one model, asked in token ids, and stopped.

vLLM is a program beside this one, so it may have an environment of its own. It is asked with the ids that transformers
would read, so no chat template of its own is in between, and both of Gemma 2's stop tokens end an answer.
"""

import json
import logging
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from statistics import mean
from threading import Lock
from typing import Any

import torch
from openai import APIConnectionError, OpenAI, OpenAIError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gemma2_post.data.turns import Message
from gemma2_post.evaluation.answering.partly import Sampling
from gemma2_post.evaluation.answering.samples import Answer, PartlyAnswered
from gemma2_post.models.tokens import STOP_TOKEN_IDS
from gemma2_post.models.work import CONCURRENT
from gemma2_post.stage.errors import UserError

logger = logging.getLogger(__name__)

TOLERANCE = 0.1
"""Largest mean difference of log-probabilities of vLLM and transformers, in nats per token; another soft-cap or window
differs by far more, and bf16 by 0.01."""
_NAME = "model"
_SECONDS_TO_START = 900


@dataclass
class Server:
    """vLLM with one model."""

    program: str
    model: str
    """A folder, or a name on the Hub."""
    log: Path
    """What it says."""
    longest: int
    """Tokens of the longest prompt with its answer."""
    num_key_value_heads: int

    def start(self) -> None:
        """Starts it, and waits until it answers.

        Raises:
            UserError: It ends, or does not answer in time.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self._command(port), stdout=log, stderr=log, env=self._environment(), start_new_session=True
            )
        self.client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=3600)
        began = time.monotonic()
        while time.monotonic() < began + _SECONDS_TO_START:
            if self.process.poll() is not None:
                raise UserError(f"vLLM ended with status {self.process.returncode} ({self.last_words()})")
            try:
                self.client.models.list()
                return
            except APIConnectionError:
                time.sleep(0.5)
        raise UserError(f"vLLM did not answer within {_SECONDS_TO_START} s ({self.last_words()})")

    def _command(self, port: int) -> list[str]:
        num_gpus = torch.cuda.device_count()
        found = [self.program, "serve", self.model, "--host", "127.0.0.1", "--port", str(port)]
        found += ["--served-model-name", _NAME, "--max-model-len", str(self.longest), "--generation-config", "vllm"]
        if num_gpus == 0:
            return [*found, "--dtype", "float32", "--enforce-eager"]
        free, total = torch.cuda.mem_get_info()  # the start model may be there, too
        found += ["--dtype", "bfloat16", "--gpu-memory-utilization", f"{0.9 * free / total:.2f}"]
        return [*found, "--tensor-parallel-size", str(math.gcd(num_gpus, self.num_key_value_heads))]

    def _environment(self) -> dict[str, str]:
        on_cpu = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"} if not torch.cuda.is_available() else {}
        return os.environ | {"VLLM_NO_USAGE_STATS": "1"} | on_cpu

    def last_words(self) -> str:
        """The last line of its log that names an error, or else its last line."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return f"its log says {(errors or lines or ['nothing'])[-1][-300:]!r}, see {self.log}"

    def has_ended(self) -> bool:
        """Whether it ends, which takes it some seconds after its engine has failed."""
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        """Stops it, with all its processes, which may outlive the first one."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=30)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def version(self) -> str:
        """vLLM's version."""
        return str(self.client.get("/../version", cast_to=dict[str, str])["version"])

    def complete(self, prompt_ids: list[int], **asked: Any) -> dict[str, Any]:
        """The first choice for a prompt."""
        further = {"return_token_ids": True, "stop_token_ids": STOP_TOKEN_IDS, "skip_special_tokens": False}
        further |= {"top_k": 0, "top_p": 1.0} | asked
        response = self.client.completions.with_raw_response.create(model=_NAME, prompt=prompt_ids, extra_body=further)
        return json.loads(response.text)["choices"][0]


def check_program(program: str, prefix: str = "") -> None:
    """Refuses an engine that is not there.

    Args:
        prefix: What stands before the names of its keys.
    """
    if shutil.which(program) is None:
        raise UserError(
            f"{prefix}engine is vllm, and there is no program {program}; install vLLM, also in an environment of its "
            f"own, and name its program in {prefix}vllm_program"
        )


@contextmanager
def serving(
    server: Server, tokenizer: PreTrainedTokenizerBase, load: Callable[[], PreTrainedModel], length: int, seed: int
) -> Iterator[Sampling]:
    """Answers prompts while vLLM runs, after a check that it computes what transformers does.

    Args:
        load: Loads the model in transformers, for the check; it is freed before vLLM starts.
        length: Longest answer, in tokens.

    Raises:
        UserError: vLLM cannot be started, computes something else, or ends twice.
    """
    texts = [tokenizer.apply_chat_template(each, return_dict=True)["input_ids"] for each in _CHECKED]
    expected = log_probabilities(load(), texts)
    torch.cuda.empty_cache()  # else torch keeps the model's memory from vLLM
    server.start()
    try:
        _check(server, texts, expected)
        yield partial(_sample, server, tokenizer, length, seed, count())
    finally:
        server.stop()


_CHECKED = [
    [{"role": "user", "content": "What is 3 plus 5?"}, {"role": "assistant", "content": "It is 8."}],
    [{"role": "user", "content": "Name two colors of the sky."}, {"role": "assistant", "content": "Blue and gray."}],
]
"""Short conversations, whose log-probabilities are compared."""


def log_probabilities(model: PreTrainedModel, texts: list[list[int]]) -> list[list[float]]:
    """The log-probability of each token after the first one."""
    found = []
    for ids in texts:
        with torch.no_grad():
            tokens = torch.tensor([ids], device=model.device)
            predicted = model(tokens).logits[0, :-1].float().log_softmax(-1)
        found.append(predicted.gather(1, tokens[0, 1:, None])[:, 0].tolist())
    return found


def differences(server: Server, texts: list[list[int]], expected: list[list[float]]) -> list[float]:
    """How far vLLM's log-probability of each token after the first ones is from the expected one, in nats."""
    found = []
    for ids, ours in zip(texts, expected, strict=True):
        choice = server.complete(ids, max_tokens=1, temperature=0.0, prompt_logprobs=0)
        theirs = [
            each[str(token)]["logprob"] for token, each in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True)
        ]
        found += [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    return found


def _check(server: Server, texts: list[list[int]], expected: list[list[float]]) -> None:
    found = mean(differences(server, texts, expected))
    logger.info("vLLM's log-probabilities differ from transformers' by %.4f nats per token", found)
    if not found <= TOLERANCE:
        raise UserError(
            f"vLLM's log-probabilities of {server.model} differ from transformers' by {found:.3f} nats per token, "
            f"more than {TOLERANCE}; use another version of vLLM, or engine: transformers"
        )


def _sample(
    server: Server,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    calls: Iterator[int],
    prompts: list[list[Message]],
    temperature: float,
    partly: PartlyAnswered,
) -> list[Answer]:
    """One answer to each prompt, from a seed of its own; an engine that dies is started once more.

    An answer is shorter where the model can read no more tokens.
    """
    ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]
    has_seeds = torch.cuda.is_available()  # its CPU build cannot sample with a seed of a request
    lock, call = Lock(), next(calls)

    def ask(number: int) -> None:
        own = {"seed": random.Random(f"{seed} {call} {number}").getrandbits(31)} if has_seeds else {}
        longest = min(length, server.longest - len(ids[number]))
        choice = server.complete(ids[number], max_tokens=longest, temperature=temperature, **own)
        token_ids = choice["token_ids"]
        end = next((i for i, token in enumerate(token_ids) if token in STOP_TOKEN_IDS), len(token_ids))
        answer = Answer(tokenizer.decode(token_ids[:end]).strip(), ids[number], token_ids[: end + 1])
        with lock:
            partly.add({number: answer}, [])

    for is_last in (False, True):
        missing = [number for number in range(len(prompts)) if number not in partly.answers]
        try:
            with ThreadPoolExecutor(CONCURRENT) as pool:
                list(pool.map(ask, missing))
        except OpenAIError as error:
            if is_last or not server.has_ended():
                raise UserError(f"vLLM fails ({error}; {server.last_words()})") from error
            logger.warning("vLLM ended with status %s; it is started once more", server.process.returncode)
            server.stop()
            server.start()
    return partly.in_order()
