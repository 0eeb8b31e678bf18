"""Recipes are strict: what is misspelt, doubled, of the wrong type or not to be set is refused with its place."""

import re
from pathlib import Path

import pytest
import yaml

from gemma2_post import cli, sft
from gemma2_post.data.keys import DataArguments, Source
from gemma2_post.models.arguments import LORA_TARGET_MODULES
from gemma2_post.stage import command_line, recipe_file
from gemma2_post.stage.command import Stage
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.recipe import keys_of, values_of
from gemma2_post.training.checks import accumulation_steps

TINY = "recipes/tiny/sft.yaml"


def written(folder: Path, text: str) -> str:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return str(file)


def parsed(config: str, *overrides: str) -> tuple[Stage, sft.Recipe]:
    return sft.COMMAND.parse(["--config", config, *overrides])


def refusal(config: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        parsed(config, *overrides)
    return str(caught.value)


# --- the file ---


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("seed: 1\nmax_length: 8\nseed: 2\n", "seed", (1, 3)),
        ("seed: 1\n'seed': 1\n", "seed", (1, 2)),
        ("datasets:\n  - path: a.jsonl\n    split: train\n    path: b.jsonl\n", "path", (2, 4)),
        ("lr_scheduler_kwargs:\n  num_cycles: 1\n  num_cycles: 2\n", "num_cycles", (2, 3)),
    ],
    ids=["top level", "quoted", "in a list", "in a mapping"],
)
def test_a_key_given_twice_is_refused_with_both_lines(
    text: str, key: str, lines: tuple[int, int], tmp_path: Path
) -> None:
    file = written(tmp_path, text)
    assert refusal(file) == f"{file}: {key} is given twice, in lines {lines[0]} and {lines[1]}; keep one of them"


def test_a_key_given_twice_in_a_value_of_the_command_line_is_said_to_be_there() -> None:
    assert refusal(TINY, "--datasets", "[{path: a, path: b}]").startswith(
        "command line: '[{path: a, path: b}]': path is given twice"
    )


def test_numbers_and_words_are_read_as_in_yaml_1_2(tmp_path: Path) -> None:
    readings = {
        "2e-5": 2e-5, "1e-4": 1e-4, "-1E+3": -1000.0, ".5e1": 5.0, "1.5e3": 1500.0, "2.0": 2.0, "32": 32,
        "no": "no", "yes": "yes", "off": "off", "on": "on", "true": True, "False": False, "null": None,
        "'true'": "true",
    }  # fmt: skip
    file = written(tmp_path, "".join(f"key{i}: {text}\n" for i, text in enumerate(readings)))
    from_file = list(recipe_file.load_recipe(file).values())
    from_command_line = [recipe_file.parse_value(text) for text in readings]
    expected = list(readings.values())
    assert from_file == from_command_line == expected
    # 1 == True == 1.0 in Python, so that equality alone would not see a wrong type.
    assert [type(value) for value in from_file] == [type(value) for value in expected]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"- seed: 1\n", "expected `key: value` lines, found list"),
        (b"", "expected `key: value` lines, found NoneType"),
        (b"seed: [1\n", "this is not valid YAML"),
        (b"\tseed: 1\n", "this is not valid YAML"),
        (b"? [seed]\n: 1\n", "the key in line 1 is not text"),
        ("run_name: Gem\xfcse\n".encode("latin-1"), "this is not valid YAML"),
    ],
    ids=["list", "empty", "open bracket", "tab", "list as key", "not UTF-8"],
)
def test_a_file_that_is_no_yaml_mapping_is_refused_with_its_name(content: bytes, found: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    assert refusal(str(file)).startswith(f"{file}: {found}")


# --- the command line ---


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ([], "command line: --config is missing"),
        (["--seed", "1"], "command line: --config is missing"),
        (["--config"], "command line: --config has no value"),
        (["--config", TINY, "--seed"], "command line: --seed has no value"),
        (["--config", TINY, "seed", "1"], "command line: 'seed' belongs to no key"),
        (["--config", TINY, "--datasets", "[{path: a"], "command line: '[{path: a': this is not valid YAML"),
        (["--config", "recipes/tiny/nothing.yaml"], "recipes/tiny/nothing.yaml: there is no such recipe"),
        (["--config", "recipes/tiny"], "recipes/tiny: there is no such recipe"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused(arguments: list[str], found: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(found)}"):
        command_line.read(arguments)


def test_the_command_line_overrides_the_file_and_counts_in_the_fingerprint() -> None:
    stage, built = parsed(
        TINY,
        "--learning_rate=1e-4",
        "--output_dir",
        "elsewhere",
        "--save_strategy",
        "no",
        "--datasets",
        "[{path: a.jsonl}]",
    )
    assert built.training.learning_rate == stage.fingerprint["recipe"]["learning_rate"] == 1e-4
    assert stage.output_dir == Path("elsewhere") and built.training.save_strategy == "no"
    assert built.data.datasets == [Source(path="a.jsonl")]
    assert stage.where == TINY and built.training.warmup_steps == 20


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--use_peft"], {"use_peft": True}),
        (["--no_bf16"], {"bf16": False}),
        (["--use_peft", "--load_in_4bit", "--bf16"], {"use_peft": True, "load_in_4bit": True, "bf16": True}),
        (["--bf16", "false", "--use_peft=true"], {"use_peft": True, "bf16": False}),
        (["--no_activation_checkpointing", "--seed", "3"], {"activation_checkpointing": False, "seed": 3}),
        (["--no_gradient_checkpointing"], {"activation_checkpointing": False}),
    ],
    ids=str,
)
def test_a_boolean_key_needs_no_value(arguments: list[str], found: dict[str, object]) -> None:
    stage, _ = parsed(TINY, *arguments)
    assert {key: stage.fingerprint["recipe"][key] for key in found} == found


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--learning_rate"], "command line: --learning_rate has no value; write --learning_rate VALUE"),
        (["--no_learning_rate"], "command line: --no_learning_rate has no value"),
        (["--use_pefd"], f"{TINY}: unknown key use_pefd (value True); did you mean use_peft?"),
        (["--no_such"], f"{TINY}: unknown key no_such (value True)"),
        (["--use_peft", "--no_use_peft"], "command line: --use_peft is given twice; keep one of them"),
        (["--use_peft", "maybe"], f"{TINY}: use_peft is 'maybe' (str); write true or false"),
    ],
    ids=str,
)
def test_only_a_boolean_key_needs_no_value(arguments: list[str], found: str) -> None:
    assert refusal(TINY, *arguments).startswith(found)


def test_a_key_may_have_its_old_name(tmp_path: Path) -> None:
    """In a file, in the file that it includes, on the command line of a stage, and of a chain."""
    keys = "model_name_or_path: a/b\noutput_dir: x\nuse_cpu: true\n"
    (tmp_path / "shared.yaml").write_text("gradient_checkpointing: true\n")
    for text, overrides, expected in (
        (f"{keys}gradient_checkpointing: false\n", (), False),
        (f"{keys}include: shared.yaml\n", (), True),
        (f"{keys}include: shared.yaml\nactivation_checkpointing: false\n", (), False),
        (f"{keys}activation_checkpointing: true\n", ("--gradient_checkpointing=false",), False),
    ):
        stage, built = parsed(
            written(tmp_path, text), "--global_batch_size=8", "--datasets", "[{path: a}]", *overrides
        )
        assert built.training.activation_checkpointing is built.training.gradient_checkpointing is expected
        assert stage.fingerprint["recipe"]["activation_checkpointing"] is expected
        assert "gradient_checkpointing" not in stage.fingerprint["recipe"]
    overrides = cli.parse_overrides(["sft.gradient_checkpointing=true"])
    assert overrides == {"sft": {"activation_checkpointing": True}}


def test_a_key_by_both_of_its_names_is_refused(tmp_path: Path) -> None:
    both = "gradient_checkpointing: true\nactivation_checkpointing: true\n"
    message = "gradient_checkpointing is the old name of activation_checkpointing, and both are given; keep"
    assert message in refusal(written(tmp_path, both))
    with pytest.raises(UserError, match="--activation_checkpointing is given twice"):
        command_line.read(["--gradient_checkpointing=true", "--activation_checkpointing=true"], needs_config=False)


def test_a_recipe_includes_a_file_beside_it_and_its_own_keys_take_precedence(tmp_path: Path) -> None:
    (tmp_path / "shared.yaml").write_text("seed: 1\nmax_length: 8\n")
    file = written(tmp_path, "include: shared.yaml\nseed: 2\n")
    assert recipe_file.load_recipe(file) == {"seed": 2, "max_length": 8}
    assert refusal(written(tmp_path, "include: nowhere.yaml\n")).startswith(f"{tmp_path}/nowhere.yaml: there is no")
    assert refusal(written(tmp_path, "include: [shared.yaml]\n")).startswith(f"{file}: include is ['shared.yaml']")


# --- keys and types ---


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("learning_rte", "0.5", "did you mean learning_rate?"),
        ("learning_rat", "0.5", "did you mean learning_rate?"),
        ("lora_alfa", "0.5", "did you mean lora_alpha?"),
        ("xyzzy", "0.5", "see --help for the keys"),
    ],
)
def test_an_unknown_or_shortened_key_is_refused_with_the_nearest_one(
    key: str, value: str, hint: str, tmp_path: Path
) -> None:
    file = written(tmp_path, f"{key}: {value}\n")
    assert refusal(file) == f"{file}: unknown key {key} (value {value}); {hint}"
    assert f"unknown key {key} (value {value}); {hint}" in refusal(TINY, f"--{key}", value)


@pytest.mark.parametrize(
    ("key", "text", "found"),
    [
        ("learning_rate", "fast", "'fast' (str); write a number"),
        ("learning_rate", "true", "True (bool); write a number"),
        ("lora_r", "1.5", "1.5 (float); write a whole number"),
        ("lora_r", "true", "True (bool); write a whole number"),
        ("lora_dropout", "[0.1]", "[0.1] (list); write a number"),
        ("use_cpu", "1", "1 (int); write true or false"),
        ("use_peft", "yes", "'yes' (str); write true or false"),
        ("seed", "null", "None (NoneType); write a whole number"),
        ("output_dir", "3", "3 (int); write text"),
        ("save_dtype", "float16", "'float16' (str); write one of float32, bfloat16"),
        ("graders", "a:b", "'a:b' (str); write a list, each item text"),
        ("held_out_datasets", "a.jsonl", "'a.jsonl' (str); write a list"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_file_key_and_value(
    key: str, text: str, found: str, tmp_path: Path
) -> None:
    file = written(tmp_path, f"{key}: {text}\n")
    assert refusal(file).startswith(f"{file}: {key} is {found}")
    assert f"{key} is {found}" in refusal(TINY, f"--{key}", text)


def test_a_whole_number_does_for_a_float_and_becomes_one() -> None:
    _, built = parsed(TINY, "--learning_rate", "1", "--num_train_epochs", "2")
    assert (built.training.learning_rate, type(built.training.learning_rate)) == (1.0, float)
    assert type(built.training.num_train_epochs) is float


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ("[{path: a, wieght: 1}]", "datasets[0]: unknown key wieght (value 1); did you mean weight?"),
        ("[{path: a, weight: much}]", "datasets[0]: weight is 'much' (str); write a number"),
        ("[{path: 3}]", "datasets[0]: path is 3 (int); write text"),
        ("[{path: a}, {split: train}]", "datasets[1]: path is missing; add `path: VALUE`"),
        ("[a.jsonl]", "datasets[0] is 'a.jsonl' (str); write a mapping with path, split, name, revision, weight"),
    ],
)
def test_a_mistake_in_a_source_is_refused_with_its_place_in_the_list(sources: str, found: str, tmp_path: Path) -> None:
    for key in ("datasets", "held_out_datasets"):
        file = written(tmp_path, f"{key}: {sources}\n")
        assert refusal(file) == f"{file}: {found.replace('datasets', key, 1)}"


@pytest.mark.parametrize("key", ["datasets", "global_batch_size"])
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    values = recipe_file.load_recipe(TINY)
    del values[key]
    file = written(tmp_path, yaml.safe_dump(values))
    assert refusal(file) == f"{file}: {key} is missing; add `{key}: VALUE`"


@pytest.mark.parametrize("key", sft.COMMAND.refused)
def test_a_key_that_must_not_be_set_is_refused_with_the_reason(key: str) -> None:
    assert key in keys_of(sft.Recipe), "nobody can set this key, so it need not be refused"
    assert refusal(TINY, f"--{key}", "1") == f"{TINY}: {key} must not be set: {sft.COMMAND.refused[key]}"


@pytest.mark.parametrize(
    ("key", "text", "found"),
    [
        ("save_strategy", "never", "never is not a valid SaveStrategy"),
        ("accelerator_config", "{splitbatches: true}", "splitbatches"),
    ],
)
def test_what_the_classes_of_transformers_refuse_is_a_mistake_of_the_user(key: str, text: str, found: str) -> None:
    message = refusal(TINY, f"--{key}", text)
    assert message.startswith(f"{TINY}: ") and found in message


# --- the batch ---


def test_accumulation_follows_from_the_global_batch_size() -> None:
    _, built = parsed(TINY, "--per_device_train_batch_size", "8")
    assert built.training.gradient_accumulation_steps == 4
    assert accumulation_steps(64, 8, num_processes=4) == 2


@pytest.mark.parametrize(("global_batch", "per_device"), [(33, 32), (16, 32), (0, 32), (-32, 32), (32, 0), (32, -32)])
def test_a_batch_that_cannot_be_divided_is_refused(global_batch: int, per_device: int) -> None:
    message = refusal(TINY, "--global_batch_size", str(global_batch), "--per_device_train_batch_size", str(per_device))
    too_low = "global_batch_size" if global_batch < 1 else "per_device_train_batch_size"
    found = f"{too_low} is {min(global_batch, per_device)}; write 1 or more"
    expected = f"per_device_train_batch_size {per_device}" if min(global_batch, per_device) > 0 else found
    assert message.startswith(TINY) and expected in message


# --- a whole recipe ---


def test_the_tiny_recipe_gives_the_values_of_its_file() -> None:
    values = recipe_file.load_recipe(TINY)
    stage, built = parsed(TINY)
    demonstrations = "gemma2_post.tiny.data:demonstrations"
    found = values_of(built)
    assert found["report_to"] == [] and values.pop("report_to") == "none"  # as transformers spells it
    sources = {key: [Source(**source) for source in values.pop(key)] for key in ("datasets", "held_out_datasets")}
    assert built.data == DataArguments(**sources, columns=["skill", "answer"])
    assert sources["held_out_datasets"] == [Source(demonstrations, split="selection")]
    assert {key: found[key] for key in values} == values and len(values) > 20
    assert found["gradient_accumulation_steps"] == 1 and found["lora_target_modules"] == LORA_TARGET_MODULES
    assert (stage.name, stage.where, stage.output_dir) == ("sft", TINY, Path("runs/tiny/sft"))
