"""Any output behind an OpenAI-compatible API: what `make serve` starts, asked by the real client; also quantised."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import APIConnectionError, OpenAI

from tests.conftest import TEACHER

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "What is 3 plus 5?"}]


QUANTIZED = [[], ["--quantization", "bnb-8bit"], ["--quantization", "bnb-4bit"]]


@pytest.fixture(scope="module", params=QUANTIZED, ids=["as it is", "8-bit", "4-bit"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    (line,) = [line for line in Path("Makefile").read_text().splitlines() if "transformers serve" in line]
    assert "--host localhost" in line and "--attn-implementation eager" in line
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", TEACHER, "--attn-implementation", "eager"]
    command += ["--host", "localhost", "--port", str(port), *request.param]
    log = tmp_path_factory.mktemp("serve") / "log"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(log, "w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0, timeout=60)
    try:
        for _ in range(300):
            try:
                ask(client)
                break
            except APIConnectionError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.2)
        yield client
    finally:
        server.terminate()
        server.wait()


def ask(client: OpenAI, **further: object) -> object:
    return client.chat.completions.create(model=TEACHER, messages=QUESTION, temperature=0, max_tokens=20, **further)


def test_it_answers_and_ends_its_turn(client: OpenAI) -> None:
    (choice,) = ask(client).choices
    assert "8" in choice.message.content and choice.finish_reason == "stop"
    assert "<end_of_turn>" not in choice.message.content


def test_it_remembers_the_conversation(client: OpenAI) -> None:
    turns = [("user", "My name is Anna."), ("assistant", "Nice to meet you, Anna."), ("user", "What is my name?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    answer = client.chat.completions.create(model=TEACHER, messages=messages, temperature=0, max_tokens=20)
    assert "Anna" in answer.choices[0].message.content


def test_it_streams(client: OpenAI) -> None:
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True) if chunk.choices]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == ask(client).choices[0].message.content
