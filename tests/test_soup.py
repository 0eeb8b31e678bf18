"""Greedy soups: members that lower the measure of the merge are left out of it."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import Gemma2ForCausalLM, PreTrainedTokenizerBase

from gemma2_post import warp
from gemma2_post.evaluation.soup import greedy
from gemma2_post.models.tokenizer import save_tokenizer
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError
from tests.conftest import TEACHER, run_stage, write_prompts

GOLD = "gemma2_post.tiny.gold:gold"


def test_members_are_added_in_the_order_of_their_own_values_if_they_do_not_lower_the_merge() -> None:
    values = {(0,): 1.0, (1,): 3.0, (2,): 2.0, (3,): 0.5, (1, 2): 2.5, (0, 1): 3.0, (0, 1, 3): 3.5}
    asked = []

    def value_of(members: list[int]) -> float:
        asked.append(tuple(members))
        return values[tuple(members)]

    assert greedy(4, value_of) == [0, 1, 3]
    assert asked == [(0,), (1,), (2,), (3,), (1, 2), (0, 1), (0, 1, 3)]


@pytest.fixture
def soup_recipe(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Two policies beside the teacher that they began as, of which the first one is broken."""
    for i, noise in enumerate((1.0, 1e-3)):
        model = Gemma2ForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
        torch.manual_seed(i)
        for parameter in model.parameters():
            parameter.data += noise * parameter.std() * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / f"policy-{i}")
        save_tokenizer(tokenizer, tmp_path / f"policy-{i}")
    return {
        "init": TEACHER,
        "policies": [str(tmp_path / f"policy-{i}") for i in range(2)],
        "interpolation": "linear",
        "eta": 1.0,
        "greedy": "gold",
        "force": True,
        "save_dtype": "float32",
        "datasets": [{"path": str(write_prompts(tmp_path / "prompts.jsonl", "selection", 12))}],
        "columns": ["skill", "answer"],
        "max_completion_length": 12,
        "output_dir": str(tmp_path / "soup"),
        "reward_functions": [GOLD],
        "graders": [GOLD],
        "num_samples": 12,
        "batch_size": 12,
    }


@pytest.mark.slow
def test_a_broken_member_is_left_out(soup_recipe: dict[str, object], tmp_path: Path) -> None:
    output = run_stage(tmp_path / "warp.yaml", warp.COMMAND, soup_recipe)
    found = json.loads((output / "greedy.json").read_text())
    broken, whole = soup_recipe["policies"]
    assert found["kept"] == [whole] and [each["members"] for each in found["tried"]] == [
        [broken],
        [whole],
        [broken, whole],
    ]
    for name, tensor in load_file(output / "model.safetensors").items():
        expected = load_file(Path(whole) / "model.safetensors")[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    assert contract.metrics_of(output)["kept"] == 1
    assert "1 policies" not in (output / "README.md").read_text()


def test_what_decides_which_members_are_kept_makes_the_merge_again(soup_recipe: dict[str, object]) -> None:
    """Without greedy, the prompts only measure."""
    for by, part in (("gold", "recipe"), (None, "measurements")):
        recipe = soup_recipe | {"greedy": by}
        found = [warp.COMMAND.fingerprint(recipe | {"num_samples": number}) for number in (12, 11)]
        assert found[0][part] != found[1][part]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"greedy": "silver"}, "greedy is silver; write reward or gold, or name it in graders"),
        ({"adapter_only": True}, "adapter_only writes no models, and datasets has prompts for them"),
        (None, "greedy is gold, and there are no prompts to measure it on; name selection prompts in datasets"),
    ],
)
def test_a_greedy_soup_that_cannot_be_measured_is_refused(
    change: dict[str, object] | None, message: str, soup_recipe: dict[str, object], tmp_path: Path
) -> None:
    if change is None:
        keys = ("init", "policies", "interpolation", "eta", "greedy", "output_dir")
        soup_recipe, change = {key: soup_recipe[key] for key in keys}, {}
    (tmp_path / "warp.yaml").write_text(yaml.safe_dump(soup_recipe | change))
    with pytest.raises(UserError, match=message):
        warp.COMMAND.parse(["--config", str(tmp_path / "warp.yaml")])
