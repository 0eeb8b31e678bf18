"""Answers from an OpenAI-compatible endpoint: your own vLLM server, or a provider's."""

import json
import logging
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, APITimeoutError, BadRequestError, OpenAI

from gemma2_post.data.turns import Message
from gemma2_post.evaluation.keys import EndpointArguments
from gemma2_post.stage.errors import UserError

logger = logging.getLogger(__name__)

FIRST_REFUSALS = 20
"""This many refusals without any answer mean that the endpoint is at fault, not the requests."""
_THIS_REQUEST_ONLY = {400, 403, 413, 422}
"""Status codes with which servers refuse a single request (too long, or against their rules)."""


class RefusedError(Exception):
    """The endpoint will never answer this one request (too long, or against its rules)."""


class _SaysThatItIsAway(logging.Handler):
    """Says on the screen that requests are retried, once in `_SECONDS_BETWEEN` seconds; the client only notes it."""

    said = -math.inf

    def emit(self, record: logging.LogRecord) -> None:
        if "Retrying request" in record.getMessage() and time.monotonic() >= self.said + _SECONDS_BETWEEN:
            self.said = time.monotonic()
            logger.warning("an endpoint is out of reach or busy; its requests are asked again")


_SECONDS_BETWEEN = 60
_client_log = logging.getLogger("openai._base_client")
_client_log.setLevel(logging.INFO)
_client_log.addHandler(_SaysThatItIsAway())

JUDGE_RETRIES = 10
"""Additional attempts to ask a judge."""


def connect(endpoint: str, args: EndpointArguments, retries: int) -> OpenAI:
    """A client that retries requests that failed, timed out or were rate-limited, with exponential backoff up to 8 s.

    Args:
        endpoint: The base URL, for example http://localhost:8000/v1.
        retries: Additional attempts after the first one.

    Raises:
        UserError: The URL is invalid or would put a secret into a file, or a key is needed and missing.
    """
    api_key_variable = args.api_key_variable
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"endpoint is {endpoint!r}; write a base URL such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise UserError(
            "endpoint holds a user, a password or a query, which would be written next to the data; put the "
            "key into an environment variable and name that in api_key_variable"
        )
    key = os.environ.get(api_key_variable, "").strip() if api_key_variable else "none"
    if not key or not key.isascii():
        raise UserError(
            f"api_key_variable is {api_key_variable}, but that environment variable holds no key; set it, or "
            "remove api_key_variable for a server that needs none"
        )
    return OpenAI(base_url=endpoint, api_key=key, timeout=args.endpoint_timeout, max_retries=retries)


def check(client: OpenAI) -> None:
    """Refuses an endpoint that cannot be reached or rejects the key, before there is work to lose.

    An endpoint that does not list its models passes, because it may still answer.
    """
    try:
        client.with_options(max_retries=2).models.with_raw_response.list()
    except APIConnectionError as error:
        reason = _without_key(client, error.__cause__ or error)
        raise UserError(f"{client.base_url} cannot be reached ({reason}); check that a server runs there") from error
    except APIStatusError as error:
        if error.status_code in (401, 403):
            raise UserError(
                f"{client.base_url} refused with status {error.status_code} "
                f"({_without_key(client, error.message)}); check the key in api_key_variable's environment variable"
            ) from error


@dataclass(frozen=True)
class Completion:
    """An endpoint's answer."""

    text: str
    finish_reason: str
    """Why it ended: "stop" if by itself, "length" if it was cut."""
    prompt_tokens: int
    """As the endpoint counts them; 0 if it does not."""
    completion_tokens: int


@dataclass(frozen=True)
class Request:
    """What an endpoint is asked."""

    place: str
    """What an error message names first, for example the prompt's row."""
    messages: list[Message]
    temperature: float
    max_tokens: int
    seed: int


@dataclass
class Endpoint:
    """A model behind an OpenAI-compatible endpoint."""

    client: OpenAI
    model: str
    token_limit: str = "max_tokens"
    """What the server calls the longest answer; newer servers of OpenAI want `max_completion_tokens`."""
    has_answered: bool = False
    """Whether it has answered before, so that refusals are about single requests."""

    def answer_all(
        self, requests: list[Request], concurrency: int, write: Callable[[int, Completion | RefusedError], None]
    ) -> None:
        """Asks in `concurrency` threads; after an error, running requests finish and no others begin.

        Args:
            write: Takes the number of a request with its answer, or why there is none, as they come, one at a time.

        Raises:
            UserError: The endpoint cannot be used as it is, or refuses everything.
        """
        lock, num_refused = Lock(), 0

        def ask(number: int) -> None:
            nonlocal num_refused
            refusal = None
            try:
                found: Completion | RefusedError = self.answer(requests[number])
            except RefusedError as error:
                found = refusal = error
            with lock:
                write(number, found)
                self.has_answered = self.has_answered or refusal is None
                num_refused += refusal is not None
                if refusal and not self.has_answered and num_refused >= FIRST_REFUSALS:
                    raise UserError(
                        f"{requests[number].place}: {refusal}, as all {num_refused} requests so far; check the "
                        "endpoint and the model's name"
                    ) from refusal

        with ThreadPoolExecutor(concurrency) as pool:
            asked = [pool.submit(ask, number) for number in range(len(requests))]
            try:
                for each in as_completed(asked):
                    each.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def answer(self, request: Request) -> Completion:
        """The answer to one request.

        Raises:
            RefusedError: The endpoint refuses this request, but may answer the next one.
            UserError: The endpoint cannot be used as it is.
        """
        client, place, url = self.client, request.place, self.client.base_url
        try:
            response = self._create(request)
        except APITimeoutError as error:
            raise UserError(
                f"{place}: {url} did not answer within {client.timeout:g} s, {client.max_retries + 1} times; raise "
                "endpoint_timeout, or lower concurrency"
            ) from error
        except APIConnectionError as error:
            reason = _without_key(client, error.__cause__ or error)
            raise UserError(
                f"{place}: {url} cannot be reached ({reason}); check endpoint, and that a server runs there"
            ) from error
        except APIStatusError as error:
            reason = f"{url} refused with status {error.status_code} ({_without_key(client, error.message)})"
            if error.status_code in _THIS_REQUEST_ONLY:
                raise RefusedError(reason) from error
            raise UserError(
                f"{place}: {reason}; check the endpoint, the model's name, and the key in the environment variable of "
                "api_key_variable"
            ) from error
        try:
            body = json.loads(response.text)
            choice = body["choices"][0]
            prompt, completion = (
                int((body.get("usage") or {}).get(f"{part}_tokens") or 0) for part in ("prompt", "completion")
            )
            text = _text_of(choice["message"]["content"])
            return Completion(text.strip(), choice["finish_reason"], prompt, completion)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            found = _without_key(client, response.text)
            raise RefusedError(
                f"{url} answered what is no chat completion ({found!r}); its base URL usually ends in /v1"
            ) from error

    def _create(self, request: Request) -> Any:
        asked: dict[str, Any] = {"model": self.model, "messages": request.messages, "seed": request.seed}
        asked |= {"temperature": request.temperature, "top_p": 1.0}
        create = self.client.chat.completions.with_raw_response.create
        try:
            return create(**asked | {self.token_limit: request.max_tokens})
        except BadRequestError as error:
            if self.token_limit != "max_tokens" or "max_completion_tokens" not in error.message:
                raise
            self.token_limit = "max_completion_tokens"
            return create(**asked | {self.token_limit: request.max_tokens})


def _text_of(content: Any) -> str:
    """The text of a message, which may come in parts; nothing if it is null, as beside thoughts that were cut."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    if not isinstance(content, str | None):
        raise TypeError("the content is no text")
    return content or ""


def _without_key(client: OpenAI, text: object) -> str:
    return " ".join(str(text).replace(client.api_key, "(the key)").split())[:150]
