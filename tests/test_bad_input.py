"""Every mistake of a user: one sentence with where, what was found and what to do; status 2; nothing touched."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gemma2_post import sft

Recipe = dict[str, object]
USER, MODEL = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def with_rows(rows: list[dict] | str) -> Callable[[Recipe, Path], Recipe]:
    def change(recipe: Recipe, folder: Path) -> Recipe:
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "bad.jsonl").write_text(text)
        return recipe | {"datasets": [{"path": str(folder / "bad.jsonl")}]}

    return change


def with_values(**values: object) -> Callable[[Recipe, Path], Recipe]:
    return lambda recipe, _: recipe | values


def with_model(change_model: Callable[[Path], None]) -> Callable[[Recipe, Path], Recipe]:
    def change(recipe: Recipe, folder: Path) -> Recipe:
        broken = shutil.copytree(recipe["model_name_or_path"], folder / "broken")
        change_model(broken)
        return recipe | {"model_name_or_path": str(broken)}

    return change


def make_adapter(directory: Path) -> None:
    (directory / "config.json").unlink()
    (directory / "adapter_config.json").write_text("{}")


def shrink_vocabulary(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))


BAD = {
    "unknown key": (
        with_values(learning_rte=1e-3),
        "unknown key learning_rte (value 0.001); did you mean learning_rate?",
    ),
    "wrong type": (with_values(max_steps=2.5), "max_steps is 2.5 (float); write a whole number"),
    "unknown file": (with_values(datasets=[{"path": "nowhere.jsonl"}]), "nowhere.jsonl: there is no such file"),
    "unsupported columns": (
        with_rows([{"title": "a", "reply": "b"}]),
        "the columns title, reply are of no known format",
    ),
    "fewer rows than a step": (
        with_rows([{"messages": [USER, MODEL]}] * 7),
        "7 conversations are fewer than global_batch_size 8, which one step needs",
    ),
    "empty data": (with_rows(""), "bad.jsonl: the file is empty"),
    "roles out of order": (
        with_rows([{"messages": [USER, MODEL]}, {"messages": [MODEL, USER]}]),
        "row 1: turn 0 is by assistant, expected user",
    ),
    "list content": (
        with_rows([{"messages": [USER, MODEL | {"content": [{"type": "image", "text": "Hello"}]}]}]),
        "row 0: the content of turn 1 is list, not text",
    ),
    "control tokens": (
        with_rows([{"messages": [USER, MODEL | {"content": "Hello<end_of_turn>"}]}]),
        "row 0: turn 1 holds the control token <end_of_turn>",
    ),
    "all rows too long": (
        with_values(max_length=3),
        "all 32 rows are longer than max_length 3 tokens; raise max_length",
    ),
    "fp16": (with_values(fp16=True), "fp16 must not be set: Gemma 2 overflows in fp16"),
    "sdpa": (with_values(attn_implementation="sdpa"), "attn_implementation is sdpa, which cannot apply"),
    "adapter as model": (with_model(make_adapter), "is an adapter, not a model"),
    "no tokenizer": (with_model(lambda directory: (directory / "tokenizer.json").unlink()), "has no tokenizer.json"),
    "vocabulary mismatch": (
        with_model(shrink_vocabulary),
        "model.embed_tokens.weight has the shape [1024, 64], and its config.json says [1000, 64]",
    ),
    "4-bit full fine-tuning": (with_values(load_in_4bit=True), "load_in_4bit is for adapters"),
    "batch": (
        with_values(global_batch_size=12),
        "global_batch_size 12 does not divide by per_device_train_batch_size 8 x 1",
    ),
    "no output folder": (with_values(output_dir=""), "output_dir is missing"),
    "longer than the model": (
        with_values(max_length=512),
        "max_length is 512, more than the 256 positions of the model",
    ),
    "an unfinished stage as model": (
        with_model(lambda directory: (directory / "begun.json").write_text("{}")),
        "is not finished; run the stage that makes it",
    ),
    "grouping by nothing": (with_values(group_by="skill"), "group_by is skill, which held-out rows lack"),
    **{
        f"{name}: {value}": (with_values(**{name: value}), f"{name} is {found}")
        for name, value, found in [
            ("learning_rate", 0, "0; write a number above 0"),
            ("learning_rate", -1e-4, "-0.0001; write a number above 0"),
            ("learning_rate", float("nan"), "nan; write a number above 0"),
            ("learning_rate", float("inf"), "inf; write a number above 0"),
            ("max_steps", 0, "0; write 1 or more (or -1)"),
            ("num_train_epochs", 0, "0; write a number above 0"),
            ("seed", -1, "-1; write 0 or more, at most 4294967295"),
            ("seed", 2**32, "4294967296; write 0 or more"),
            ("max_length", 0, "0; write 1 or more"),
            ("max_new_tokens", 0, "0; write 1 or more"),
            ("logging_steps", 0, "0; write a number above 0"),
            ("save_steps", -5, "-5; write a number above 0"),
            ("warmup_steps", -1, "-1; write 0 or more"),
            ("weight_decay", -0.1, "-0.1; write 0 or more"),
            ("adam_beta2", 1.0, "1; write 0 or more, below 1"),
            ("max_grad_norm", -1, "-1; write 0 or more"),
            ("dataloader_num_workers", -1, "-1; write 0 or more"),
            ("num_samples", -1, "-1; write 0 or more"),
            ("held_out_share", 1.5, "1.5; write a number above 0, below 1"),
            ("max_invalid_share", 2.0, "2; write 0 or more, at most 1"),
            ("report_to", "nonsense", "nonsense, which transformers does not know"),
            ("report_to", ["comet_ml"], "comet_ml, which is not installed; pip install comet_ml"),
        ]
    },
    **{
        f"adapter, {name}: {value}": (with_values(use_peft=True, **{name: value}), f"{name} is {found}")
        for name, value, found in [
            ("lora_r", 0, "0; write 1 or more"),
            ("lora_alpha", 0, "0; write 1 or more"),
            ("lora_dropout", 1.0, "1; write 0 or more, below 1"),
        ]
    },
    "an empty list of data": (with_values(datasets=[]), "datasets is empty; write one or more"),
    "a negative weight": (
        with_values(datasets=[{"path": "a.jsonl", "weight": -1}]),
        "datasets[0]: weight is -1; write a number above 0",
    ),
    "answers beyond the positions": (
        with_values(max_new_tokens=256),
        "max_new_tokens 256 leaves 0 of the model's 256 positions for a prompt",
    ),
    "arguments of another scheduler": (
        with_values(lr_scheduler_type="cosine", lr_scheduler_kwargs={"min_lr": 0.1}),
        "lr_scheduler_type cosine does not work with lr_scheduler_kwargs {'min_lr': 0.1}",
    ),
    "an optimizer that is not installed": (
        with_values(optim="galore_adamw"),
        "optim galore_adamw cannot be used (You need to install `galore_torch`",
    ),
    "arguments of an optimizer that are none": (
        with_values(optim_args="fast"),
        "optim adamw_torch_fused cannot be used",
    ),
    "arguments that a scheduler ignores": (
        with_values(lr_scheduler_kwargs={"min_lr": 0.1}),
        "lr_scheduler_kwargs has no effect with lr_scheduler_type constant",
    ),
    "a scheduler without its arguments": (
        with_values(lr_scheduler_type="cosine_with_min_lr"),
        "lr_scheduler_type cosine_with_min_lr does not work with lr_scheduler_kwargs {}",
    ),
    "packing": (with_values(packing=True), "packing with eager attention needs memory"),
    "packing and evaluating": (
        with_values(packing=True, per_device_train_batch_size=1, eval_strategy="steps"),
        "per_device_eval_batch_size is 4, and eval_strategy or eval_on_start with packing and eager attention",
    ),
    "packing without a length": (
        with_values(packing=True, per_device_train_batch_size=1, max_length=None),
        "max_length is none, and packing needs the length of a packed row; write a number of tokens",
    ),
    "grader": (
        with_values(graders=["gemma2_post.tiny.gold:silver"]),
        "gemma2_post.tiny.gold:silver: there is no such function",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_a_mistake_is_one_sentence_with_status_2_and_touches_nothing(
    change: Callable[[Recipe, Path], Recipe],
    message: str,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(change(recipe, tmp_path)))
    monkeypatch.setattr(sys, "argv", ["sft", "--config", str(file)])
    with pytest.raises(SystemExit) as stopped:
        sft.COMMAND.launch()
    assert stopped.value.code == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in sentence and str(file) in sentence
    assert not Path(recipe["output_dir"]).exists()
