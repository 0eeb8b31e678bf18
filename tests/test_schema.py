"""What editors and readers are told of recipes: the JSON Schemas and the reference, from the recipes' own types."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from jsonschema import Draft7Validator

from gemma2_post.pipeline.schema import pipeline_schema, schema_of, write_reference
from gemma2_post.selftest import environment
from gemma2_post.stage.recipe_file import load_yaml
from gemma2_post.stage.reference import WIDTH, describe_keys, wrapped
from gemma2_post.stage.stages import STAGES, command_of

SCHEMAS = Path("recipes/schema")
RECIPES = sorted(Path("recipes").glob("*/*.yaml"))
of_the_tested_versions = pytest.mark.skipif(
    any(environment.TESTED[name] != version(name) for name in ("transformers", "trl")),
    reason="transformers and TRL describe their keys in other words in other versions than the tested ones",
)


def kind_of(path: Path) -> str:
    """The stage of a recipe, or `pipeline`."""
    return "pipeline" if path.stem == "curation" else path.stem.partition("-")[0]


def errors(kind: str, values: dict[str, object]) -> list[str]:
    validator = Draft7Validator(json.loads((SCHEMAS / f"{kind}.json").read_text()))
    return [error.message for error in validator.iter_errors(values)]


@of_the_tested_versions
def test_the_schemas_in_the_repository_are_those_of_the_recipes() -> None:
    assert {path.stem for path in SCHEMAS.glob("*.json")} == {*STAGES, "pipeline"}
    for stage in STAGES:
        assert json.loads((SCHEMAS / f"{stage}.json").read_text()) == schema_of(command_of(stage)), (
            "run gemma2-post schema recipes/schema"
        )
    assert json.loads((SCHEMAS / "pipeline.json").read_text()) == pipeline_schema()


@of_the_tested_versions
def test_the_reference_in_the_documentation_is_current(tmp_path: Path) -> None:
    write_reference(tmp_path / "reference.md")
    expected = (tmp_path / "reference.md").read_text()
    assert Path("docs/reference.md").read_text() == expected, "run gemma2-post schema --markdown docs/reference.md"


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_a_shipped_recipe_names_its_schema_and_is_valid(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first == f"# yaml-language-server: $schema=../schema/{kind_of(path)}.json"
    assert errors(kind_of(path), load_yaml(path)) == []


@pytest.mark.parametrize(
    ("path", "change", "found"),
    [
        ("tiny/sft.yaml", {"learning_rte": 1e-3}, "'learning_rte' was unexpected"),
        ("tiny/sft.yaml", {"learning_rate": "fast"}, "'fast' is not of type 'number'"),
        ("tiny/sft.yaml", {"use_peft": "yes"}, "'yes' is not of type 'boolean'"),
        ("tiny/sft.yaml", {"save_dtype": "float16"}, "'float16' is not one of ['float32', 'bfloat16']"),
        ("tiny/sft.yaml", {"fp16": True}, "True should not be valid under {}"),
        ("tiny/rlhf.yaml", {"save_steps": 10}, "10 should not be valid under {}"),
        ("tiny/evaluate.yaml", {"datasets": [{"pth": "a"}]}, "'path' is a required property"),
        ("tiny/warp.yaml", {"interpolation": "slurp"}, "'slurp' is not one of"),
        ("tiny/pipeline.yaml", {"lunch": "cpu.yaml"}, "'lunch' was unexpected"),
        ("tiny/pipeline.yaml", {"stages": {"sft": {"recipe": "sft.yaml", "modell": "x"}}}, "'modell' was unexpected"),
        ("tiny/pipeline.yaml", {"stages": {"sft": {"recipe": 3}}}, "3 is not of type 'string'"),
    ],
)
def test_a_mistake_is_one_in_an_editor_too(path: str, change: dict[str, object], found: str) -> None:
    values = load_yaml(Path("recipes") / path)
    messages = errors(kind_of(Path(path)), values | change)
    assert any(found in message for message in messages), messages
    assert errors(kind_of(Path(path)), values) == []


def test_a_recipe_without_a_key_that_it_needs_is_invalid_unless_it_includes_a_file() -> None:
    values = load_yaml("recipes/tiny/sft.yaml")
    assert errors("sft", {key: values[key] for key in values if key != "include"})
    del values["global_batch_size"]
    assert not errors("sft", values)  # which may be in the file


@pytest.mark.parametrize("stage", STAGES)
def test_the_help_has_every_key_with_its_type_and_default_in_100_columns(stage: str) -> None:
    command = command_of(stage)
    lines = [
        *wrapped(command.documentation).splitlines(),
        *describe_keys(command.recipe, command.refused).splitlines(),
    ]
    assert max(map(len, lines)) <= WIDTH == 100
    properties = {name for name, each in schema_of(command)["properties"].items() if "not" not in each} - {"include"}
    assert {line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")} == properties
    assert not any(f"--{name} " in line for name in command.refused for line in lines)


def test_the_help_says_what_a_key_is() -> None:
    text = " ".join(describe_keys(command_of("sft").recipe, {}).split())
    assert "--max_new_tokens (a whole number, 1 or more; default 256) Longest sampled answer, in tokens." in text
    assert "--global_batch_size (a whole number, 1 or more; required) Rows per optimizer step" in text
    assert "--save_dtype (one of float32, bfloat16; default bfloat16)" in text
    assert "Keys of SFTConfig (trl): " in text and "--learning_rate (a number, above 0; default 2e-05)" in text
