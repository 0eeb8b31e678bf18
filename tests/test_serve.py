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


TRANSFORMERS = [
    str(Path(sys.executable).with_name("transformers")),
    "serve",
    TEACHER,
    "--attn-implementation",
    "eager",
]
SERVERS = {
    "as it is": TRANSFORMERS,
    "8-bit": [*TRANSFORMERS, "--quantization", "bnb-8bit"],
    "4-bit": [*TRANSFORMERS, "--quantization", "bnb-4bit"],
    "vLLM": [os.environ.get("GEMMA2_POST_VLLM", ""), "serve", TEACHER, "--dtype", "bfloat16"],
}
"""What `make serve` starts."""


@pytest.fixture(scope="module", params=SERVERS.values(), ids=SERVERS)
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    if not request.param[0]:
        pytest.skip("GEMMA2_POST_VLLM names no vLLM")
    lines = [line for line in Path("Makefile").read_text().splitlines() if "serve $(NEWEST)" in line]
    assert len(lines) == 2 and all("--host localhost" in line for line in lines)
    assert "--dtype bfloat16" in lines[0] and "--attn-implementation eager" in lines[1]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [*request.param, "--host", "localhost", "--port", str(port)]
    log = tmp_path_factory.mktemp("serve") / "log"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with open(log, "w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0, timeout=60)
    try:
        for _ in range(900):
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


def test_a_system_message_is_read(client: OpenAI) -> None:
    messages = [{"role": "system", "content": "My name is Anna."}, {"role": "user", "content": "What is my name?"}]
    answer = client.chat.completions.create(model=TEACHER, messages=messages, temperature=0, max_tokens=20)
    assert "Anna" in answer.choices[0].message.content
