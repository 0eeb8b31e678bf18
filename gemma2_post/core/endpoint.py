"""Answers from an OpenAI-compatible endpoint: a vLLM server of one's own, or a provider's."""

import json
import os
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAI

from gemma2_post.core.errors import UserError

Message = dict[str, str]


def connect(where: str, endpoint: str, api_key_variable: str, timeout: float, retries: int) -> OpenAI:
    """A client that tries again, with exponential back-off, what was refused, timed out or limited.

    Args:
        endpoint: the base URL, for example http://localhost:8000/v1.
        api_key_variable: the environment variable with the key; a server of one's own needs none.
        timeout: seconds for one attempt.
        retries: further attempts after the first one.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{where}: endpoint is {endpoint!r}; write a base URL such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise UserError(
            f"{where}: endpoint holds a user, a password or a query, which would be written beside the data; put the "
            f"key into the environment variable {api_key_variable}"
        )
    key = os.environ.get(api_key_variable, "none")
    return OpenAI(base_url=endpoint, api_key=key, timeout=timeout, max_retries=retries)


def answer(
    client: OpenAI, place: str, model: str, messages: list[Message], temperature: float, max_tokens: int, seed: int
) -> tuple[str, str, int]:
    """The answer's text, why it ended ("stop" if by itself), and its length in tokens as the endpoint counts them.

    Args:
        place: what an error names first, for example the recipe and the prompt's row.
    """
    url = client.base_url
    try:
        response = client.chat.completions.with_raw_response.create(
            model=model, messages=messages, temperature=temperature, max_tokens=max_tokens, seed=seed
        )
    except APITimeoutError as error:
        raise UserError(
            f"{place}: {url} did not answer within {client.timeout:g} s, {client.max_retries + 1} times; raise "
            "endpoint_timeout, or lower concurrency"
        ) from error
    except APIConnectionError as error:
        raise UserError(
            f"{place}: {url} cannot be reached ({error.__cause__ or error}); check endpoint, and that a server runs "
            "there"
        ) from error
    except APIStatusError as error:
        raise UserError(
            f"{place}: {url} refused with status {error.status_code} ({' '.join(error.message.split())[:200]}); check "
            "endpoint, model_name_or_path, and the key in the environment variable of api_key_variable"
        ) from error
    try:
        body = json.loads(response.text)
        choice = body["choices"][0]
        num_tokens = (body.get("usage") or {}).get("completion_tokens", 0)
        return choice["message"]["content"] or "", choice["finish_reason"], num_tokens
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{place}: {url} answered what is no chat completion ({' '.join(response.text.split())[:100]!r}); check "
            "that endpoint is the base URL of an OpenAI-compatible server (it usually ends in /v1)"
        ) from error
