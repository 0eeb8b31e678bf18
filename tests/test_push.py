"""Pushing a model, by the Hub's own client, to a server here that speaks the Hub's protocol."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gemma2_post.models.folder import ADAPTER
from gemma2_post.stage import card, contract
from gemma2_post.stage.fingerprint import PARTS
from tests.conftest import TEACHER

Recipe = dict[str, object]
Run = Callable[[Recipe], Path]

TOKEN = "hf_a_token_of_this_test"


@dataclass
class Hub:
    """What the server was told, and where it is."""

    url: str = ""
    created: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    """Content of the last commit, by name."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files, by hash."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, content: dict[str, Any], status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self) -> None:
            body = self.body()
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer({"error": "no"}, 401)
            if self.path == "/api/repos/create":
                hub.created = json.loads(body)
                if hub.created.get("organization") == "others":  # it is there, says GET
                    return self.answer({"error": "no"}, 403)
                return self.answer({"url": f"{hub.url}/someone/model", "name": "someone/model"})
            if self.path.startswith("/api/models/others"):
                return self.answer({"error": "no"}, 403)
            if "/preupload/" in self.path:
                names = [each["path"] for each in json.loads(body)["files"]]
                modes = {True: "lfs", False: "regular"}
                files = [{"path": name, "uploadMode": modes[name.endswith(".safetensors")]} for name in names]
                return self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
            if self.path.endswith("/info/lfs/objects/batch"):
                objects = json.loads(body)["objects"]
                upload = {each["oid"]: {"href": f"{hub.url}/store/{each['oid']}"} for each in objects}
                return self.answer(
                    {"objects": [each | {"actions": {"upload": upload[each["oid"]]}} for each in objects]}
                )
            if self.path == "/api/validate-yaml":
                return self.answer({"warnings": [], "errors": []})
            lines = [json.loads(line) for line in body.splitlines()]
            for value in [line["value"] for line in lines if line["key"] == "file"]:
                hub.files[value["path"]] = base64.b64decode(value["content"])
            for value in [line["value"] for line in lines if line["key"] == "lfsFile"]:
                hub.files[value["path"]] = hub.stored[value["oid"]]
            url = f"{hub.url}/someone/model/commit/{'0' * 40}"
            return self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": url})

        def do_PUT(self) -> None:
            hub.stored[self.path.rpartition("/")[2]] = self.body()
            self.answer({})

        def do_GET(self) -> None:
            self.answer({"siblings": [], "id": "someone/model", "sha": "0" * 40})

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    hub.url = f"http://localhost:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """What the files of a finished stage look like, without an adapter."""
    folder = shutil.copytree(TEACHER, tmp_path / "run" / "policy-0")
    card.begin(folder, "rlhf", "google/gemma-2-2b", "rlhf", "Trained.")
    parts: dict[str, object] = {name: {} for name in PARTS}
    done = {"stage": "rlhf", "fingerprint": parts, "output": "", "wall_seconds": 1, "metrics": {}}
    contract.write_json(folder / contract.DONE, done)
    return folder


def push(hub: Hub, *arguments: object, token: str = TOKEN, offline: str = "0") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": offline,
    }
    command = [sys.executable, "-m", "gemma2_post.cli", "push", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_what_is_pushed_names_no_folder_of_this_machine(
    hub: Hub, run_sft: Run, recipe: Recipe, tmp_path: Path
) -> None:
    """Of a run, the model with the most stages behind it, not what it replaced, and not its adapter, whose base lies
    on this machine."""
    run = tmp_path / "run"
    sft = run_sft(recipe | {"output_dir": str(run / "sft")})
    adapted = {"use_peft": True, "model_name_or_path": str(sft), "output_dir": str(run / "again")}
    last = run_sft(recipe | adapted)
    assert (last / "adapter" / ADAPTER).is_file() and not (last / "adapter/README.md").exists()
    shutil.copytree(last, run / "replaced" / "again")
    pushed = push(hub, run, "someone/model")
    assert pushed.returncode == 0, pushed.stderr
    assert f"it is at {hub.url}/someone/model" in pushed.stdout
    assert hub.created["visibility"] == "private"
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md", "chat_template.jinja"}
    assert hub.files.keys() == expected | {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
    for name, content in hub.files.items():
        assert content == (last / name).read_bytes(), name
        assert str(tmp_path).encode() not in content and str(Path.home()).encode() not in content, name


def test_an_adapter_goes_with_it_if_others_can_get_its_base(hub: Hub, output: Path) -> None:
    (output / "adapter").mkdir()
    (output / "adapter" / ADAPTER).write_text('{"base_model_name_or_path": "google/gemma-2-2b"}')
    assert push(hub, output, "someone/model", "--public").returncode == 0
    assert f"adapter/{ADAPTER}" in hub.files
    assert hub.created["visibility"] == "public"


def test_refusals_of_the_hub(hub: Hub, output: Path) -> None:
    assert "run hf auth login with a token" in refused(push(hub, output, "someone/model", token="hf_wrong"))
    assert "your token may not write to others/model" in refused(push(hub, output, "others/model"))
    assert "is no name of a repository" in refused(push(hub, output, "a/b/c"))
    assert "HF_HUB_OFFLINE is set" in refused(push(hub, output, "someone/model", offline="1"))
    hub.url = "http://localhost:9"
    assert "the Hub did not take someone/model" in refused(push(hub, output, "someone/model"))


def test_what_is_no_finished_model(hub: Hub, output: Path, tmp_path: Path) -> None:
    assert "there is no folder nowhere" in refused(push(hub, "nowhere", "someone/model"))
    (tmp_path / "empty").mkdir()
    assert "has no finished model" in refused(push(hub, tmp_path / "empty", "someone/model"))
    shutil.copytree(output, output.with_name("policy-1"))
    assert "ends in 2 models; name one of them" in refused(push(hub, output.parent, "someone/model"))
    config = output / "tokenizer_config.json"
    config.write_text(config.read_text().replace("{", f'{{"name_or_path": "{tmp_path}/run",', 1))
    assert f"tokenizer_config.json contains {tmp_path}" in refused(push(hub, output, "someone/model"))
    (output / card.NAME).unlink()
    assert "has no README.md, the model card" in refused(push(hub, output, "someone/model"))
    (output / contract.DONE).rename(output / contract.BEGUN)
    assert "is not finished" in refused(push(hub, output, "someone/model"))
    assert not hub.created


def refused(pushed: subprocess.CompletedProcess[str]) -> str:
    assert pushed.returncode == 2, pushed.stderr
    (line,) = pushed.stderr.splitlines()
    return line
