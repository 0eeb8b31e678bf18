"""The model card of each output with weights: how it was made, the stages behind it, their numbers and gates."""

import json
from collections.abc import Callable
from pathlib import Path

import yaml

from gemma2_post.stage import card

Recipe = dict[str, object]
Run = Callable[[Recipe], Path]


def test_a_card_has_the_chain_and_no_path_of_this_machine(
    run_sft: Run, recipe: Recipe, model_dir: Path, tmp_path: Path
) -> None:
    """TRL's card, which a checkpoint writes, calls its model a fine-tuned version of None."""
    first = run_sft(recipe | {"save_strategy": "steps", "save_steps": 1})
    second = run_sft(recipe | {"model_name_or_path": str(first), "output_dir": str(tmp_path / "second")})
    text = (second / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license"] == "gemma" and head["tags"] == ["gemma2", "sft"]
    assert "base_model" not in head, "a local folder is no model of the Hub"
    assert f"trained it, with TRL, from `{first.name}`" in text and f"its chain is `{model_dir.name}`" in text
    assert "Gemma Terms of Use" in text and "None" not in text
    assert text.index(f"### sft: {first.name}") < text.index("### sft: second")
    metrics = json.loads((second / "metrics.json").read_text())
    assert f"| held_out_nll | {metrics['held_out_nll_before']:.4g} | {metrics['held_out_nll']:.4g} |  |" in text
    for output in (first, second):
        assert str(tmp_path) not in (output / "README.md").read_text()


def test_a_gate_stands_beside_what_it_is_on(run_sft: Run, recipe: Recipe) -> None:
    output = run_sft(recipe)
    card.end(output, {output: {"held_out_nll": "<= 9"}})
    lines = (output / "README.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| held_out_nll |")]
    assert line.endswith("| <= 9 |")
    assert len([line for line in lines if line.startswith("## ")]) == 1, "the second half is replaced, not repeated"


def test_a_model_of_the_hub_is_its_base(tmp_path: Path) -> None:
    card.begin(tmp_path, "sft", "google/gemma-2-2b", "sft", "Trained.")
    assert yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])["base_model"] == "google/gemma-2-2b"
