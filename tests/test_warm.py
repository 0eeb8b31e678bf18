"""WARM: one score head that is trained first, members that begin with it, and the mean of their weights."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from gemma2_post import reward, warm
from gemma2_post.evaluation.averages import compare
from gemma2_post.evaluation.pairs import ScoredPair
from gemma2_post.models import reward_model
from gemma2_post.models.loading import load_config
from gemma2_post.pipeline import check
from gemma2_post.pipeline.loading import load_pipeline
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.paths import Kind, Reference
from tests.conftest import TEACHER, only_one_at_a_time, run_stage, write_pairs
from tests.test_members import write
from tests.test_reward import LORA, conversations, held_out

Run = Callable[[dict[str, object]], Path]
Recipe = dict[str, object]


def pairs(*differences: float) -> list[ScoredPair]:
    return [ScoredPair(difference, 0.0, 1, 5, 5) for difference in differences]


def test_an_average_is_compared_with_its_members_and_with_the_mean_of_their_scores() -> None:
    """Two members are right on half of four pairs; the mean of their scores, on three; the average, on all."""
    members = {"member-0": pairs(3, -1, -1, 1), "member-1": pairs(-1, 3, -1, 1.5)}
    found = compare(pairs(1, 1, 1, 1), members)
    assert (found["accuracy"], found["ensemble_accuracy"], found["member_accuracy"]) == (1, 0.75, 0.5)
    assert (found["member_accuracy/member-0"], found["gain_over_members"], found["gain_over_ensemble"]) == (
        0.5,
        0.5,
        0.25,
    )
    assert found["gain_over_members/low"] < 0.5 < found["gain_over_members/high"]


@pytest.fixture
def trained(run_reward: Run, reward_recipe: Recipe, tmp_path: Path) -> Callable[..., list[str]]:
    """A score head, trained alone, and two members that begin with it and differ in their seed and learning rate."""

    def train(method: Recipe) -> list[str]:
        recipe = reward_recipe | method | {"num_samples": 0, "save_dtype": "bfloat16" if method else "float32"}
        head = run_reward(recipe | {"output_dir": str(tmp_path / "head"), "only_score_head": True, "seed": 3})
        member = recipe | {"score_head": str(head)}
        return [
            str(head),
            str(run_reward(member | {"output_dir": str(tmp_path / "member-0"), "learning_rate": 1e-2})),
            str(run_reward(member | {"output_dir": str(tmp_path / "member-1"), "seed": 1})),
        ]

    return train


def unrounded(member: Path, start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A member's weights from its adapter of LORA, before they were rounded to bf16."""
    adapter = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in load_file(member / "adapter" / "adapter_model.safetensors").items()
    }
    found = start | {"score.weight": adapter["score.weight"]}
    for name, a in adapter.items():
        if name.endswith(".lora_A.weight"):
            b, scale = adapter[name.replace("lora_A", "lora_B")], LORA["lora_alpha"] / LORA["lora_r"]
            found[name.replace(".lora_A", "")] = start[name.replace(".lora_A", "")].float() + scale * b @ a
    return {name: tensor.float() for name, tensor in found.items()}


def warm_recipe(members: list[str], reward_recipe: Recipe, tmp_path: Path) -> Recipe:
    return {
        "reward_models": members,
        "datasets": reward_recipe["held_out_datasets"],
        "flipped_datasets": [{"path": str(write_pairs(tmp_path / "flipped.jsonl", "train", 6))}],
        "output_dir": str(tmp_path / "warm"),
        "save_dtype": "float32",
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", [{}, LORA], ids=["full", "lora"])
def test_the_mean_of_members_that_begin_with_one_head(
    method: Recipe,
    trained: Callable[..., list[str]],
    reward_recipe: Recipe,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head, *members = trained(method)
    base = load_file(model_dir / "model.safetensors")
    probed = load_file(Path(head) / "model.safetensors")
    assert all(
        torch.equal(probed[name].float(), base[name].float()) for name in base
    )  # nothing but the head has moved
    begun = [json.loads((Path(each) / "before.json").read_text()) for each in members]
    after = json.loads((Path(head) / "metrics.json").read_text())
    for name in ("accuracy", "reward_mean", "reward_spread"):
        assert [each[name] for each in begun] == pytest.approx([after[name]] * 2, rel=1e-4)

    recipe = warm_recipe(members, reward_recipe, tmp_path)
    with monkeypatch.context() as during:
        during.setattr(reward_model, "read", only_one_at_a_time(reward_model.read))
        output = run_stage(tmp_path / "warm.yaml", warm.COMMAND, recipe)
    weights = [
        unrounded(Path(each), probed) if method else load_file(Path(each) / "model.safetensors") for each in members
    ]
    found = load_file(output / "model.safetensors")
    assert found.keys() == weights[0].keys() and any((weights[0][name] != weights[1][name]).any() for name in found)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (weights[0][name] + weights[1][name]) / 2, rtol=1e-6, atol=1e-7)

    loaded = reward_model.load(str(output))  # its canary holds
    assert loaded.max_length == 256 and loaded.spread > 0
    chats = conversations(held_out(reward_recipe))
    scores = [
        reward_model.score(reward_model.load(each).model, loaded.tokenizer, chats) for each in (*members, str(output))
    ]
    metrics = json.loads((output / "metrics.json").read_text())

    def accuracy(each: list[float]) -> float:
        half = len(each) // 2
        return sum(a > b for a, b in zip(each[:half], each[half:], strict=True)) / half

    mean_of_scores = [sum(both) / 2 for both in zip(*scores[:2], strict=True)]
    assert metrics["member_accuracy/member-1"] == pytest.approx(accuracy(scores[1]))
    assert metrics["ensemble_accuracy"] == pytest.approx(accuracy(mean_of_scores))
    assert metrics["accuracy"] == pytest.approx(accuracy(scores[2]))
    assert 0 <= metrics["member_accuracy_flipped"] <= 1 and "accuracy_shifted" not in metrics
    assert (loaded.mean, loaded.spread) == (metrics["answer_reward_mean"], metrics["answer_reward_spread"])


@pytest.mark.slow
def test_members_that_do_not_belong_together_are_refused(
    trained: Callable[..., list[str]], reward_recipe: Recipe, run_reward: Run, tmp_path: Path
) -> None:
    _, *members = trained({})
    other = str(run_reward(reward_recipe | {"num_samples": 0, "max_steps": 1, "output_dir": str(tmp_path / "other")}))
    for named, message in (
        (members[:1], "reward_models has 1 model, and a mean needs two"),
        ([members[0], members[0]], "twice; name each once"),
        ([members[0], f"{members[0]}/."], "twice; name each once"),
        ([members[0], other], "other begins with a score head of its own, so a mean with it may be worse than each"),
        ([members[0], str(reward_recipe["model_name_or_path"])], "is no finished output of the reward stage"),
    ):
        with pytest.raises(UserError, match=message):
            run_stage(tmp_path / "warm.yaml", warm.COMMAND, warm_recipe(named, reward_recipe, tmp_path))
    recipe = warm_recipe([members[0], other], reward_recipe, tmp_path) | {"force": True}
    assert (run_stage(tmp_path / "warm.yaml", warm.COMMAND, recipe) / "reward_model.json").is_file()


@pytest.mark.slow
def test_members_whose_adapters_cannot_be_averaged_are_averaged_as_whole_models(
    trained: Callable[..., list[str]],
    reward_recipe: Recipe,
    run_reward: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One adapts other modules, one changes the norms of columns (DoRA), and of one the adapter has been deleted."""
    head, first, second = trained(LORA)
    shutil.rmtree(Path(second) / "adapter")
    member = reward_recipe | LORA | {"num_samples": 0, "score_head": head, "save_dtype": "bfloat16"}
    others = [second]
    for name, keys in {"modules": {"lora_target_modules": ["q_proj"]}, "dora": {"use_dora": True}}.items():
        others.append(str(run_reward(member | keys | {"output_dir": str(tmp_path / name)})))
    for other in others:
        recipe = warm_recipe([first, other], reward_recipe, tmp_path)
        recipe |= {"output_dir": str(tmp_path / f"warm-{Path(other).name}")}
        found = load_file(run_stage(tmp_path / "warm.yaml", warm.COMMAND, recipe) / "model.safetensors")
        weights = [load_file(Path(each) / "model.safetensors") for each in (first, other)]
        for name, tensor in found.items():
            mean = (weights[0][name].float() + weights[1][name].float()) / 2
            torch.testing.assert_close(tensor, mean, rtol=1e-6, atol=1e-7)
    assert capsys.readouterr().out.count("warning: the mean is one of whole models, some of them saved in bf") == 3


def test_a_score_head_is_the_same_one_whatever_was_measured_of_it(reward_model_dir: Path, tmp_path: Path) -> None:
    """Its canary and normalization follow from the rows it was measured on; its members need not train again."""
    heads = [str(shutil.copytree(reward_model_dir, tmp_path / name)) for name in ("one", "two", "three")]
    weights = load_file(Path(heads[2]) / "model.safetensors")
    weights["score.weight"] += 1
    save_file(weights, Path(heads[2]) / "model.safetensors", metadata={"format": "pt"})
    (Path(heads[1]) / "reward_model.json").write_text("{}")
    for head in heads:
        (Path(head) / "stage.json").write_text(json.dumps({"output": "x"}))
    one, two, three = (reward.digest_of(Reference("score_head", Kind.MODEL, head)) for head in heads)
    assert one == two != three
    whole = [contract.input_digest(head) for head in heads]
    assert whole[0] != whole[1]


def test_a_head_of_another_width_is_refused(reward_recipe: Recipe, reward_model_dir: Path, run_reward: Run) -> None:
    with pytest.raises(UserError, match=re.escape(f"score_head names {reward_model_dir}, whose head reads")):
        run_reward(reward_recipe | {"score_head": str(reward_model_dir)})


def test_a_score_head_alone_is_planned_as_such(reward_recipe: Recipe) -> None:
    from gemma2_post.stage import launcher
    from gemma2_post.stage.command import Checked

    def optimizer(**keys: object) -> float:
        _, recipe = reward.COMMAND.build(reward_recipe | keys)
        config = load_config(str(reward_recipe["model_name_or_path"]))
        checked = Checked(
            recipe, launcher.of_this_process(recipe.training), dict.fromkeys(["model_name_or_path"], config)
        )
        return reward.memory(checked)["training step"]["optimizer"]

    assert optimizer(only_score_head=True) == 64 * 8 < optimizer() / 1000


def test_a_pipeline_hands_on_head_members_and_average(tmp_path: Path) -> None:
    stages = {
        "head": {"recipe": "head.yaml", "stage": "reward"},
        "reward": {"recipe": "reward.yaml", "members": [{"learning_rate": 1e-4}, {}], "score_head": "head"},
        "warm": {"recipe": "warm.yaml", "reward_models": ["reward"]},
        "rlhf": {"recipe": "rlhf.yaml", "reward_model": "warm"},
    }
    pipeline = load_pipeline(write(tmp_path, stages))
    run = tmp_path / "run"
    assert pipeline.references_of("warm")["reward_models"] == [str(run / f"reward/member-{i}") for i in range(2)]
    assert pipeline.references_of("reward")["score_head"] == str(run / "head")
    assert pipeline.references_of("rlhf")["reward_model"] == str(run / "warm")
    assert yaml.safe_load(Path("recipes/tiny/warm.yaml").read_text())["reward_models"] == ["runs/tiny/reward-members"]


_RUN = "runs/tiny-full"
_MEMBERS = [f"{_RUN}/reward-members/member-{i}" for i in range(3)]
_OWN_HEADS = {"reward-members": {"score_head": None}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warm": {"reward_models": _MEMBERS[:1]}}, "warm.yaml: reward_models has 1 model, and a mean needs two"),
        ({"warm": {"reward_models": [*_MEMBERS, _MEMBERS[0]]}}, f"reward_models names {_MEMBERS[0]} twice"),
        (_OWN_HEADS, f"warm.yaml: {_MEMBERS[0]} begins with a score head of its own"),
        ({"warm": {"reward_models": [*_MEMBERS, f"{_RUN}/reward-head"]}}, "reward-head begins with a score head of"),
        ({"warm": {"reward_models": [f"{_RUN}/sft", *_MEMBERS]}}, f"reward_models names {_RUN}/sft, and sft makes no"),
        (
            {"warm": {"datasets": [{"path": "gemma2_post.tiny.data:preferences", "split": "train"}]}},
            "asks what .* asks, which reward-members member 0 trains on",
        ),
        ({"rlhf": {"reward_model": f"{_RUN}/sft"}}, f"reward_model names {_RUN}/sft, and sft makes no reward model"),
        ({"rlhf": {"model_name_or_path": f"{_RUN}/warm"}}, f"model_name_or_path names {_RUN}/warm, and warm makes a"),
    ],
)
def test_reward_models_that_cannot_be_used_are_refused_before_they_are_trained(
    changes: dict[str, Recipe], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check.check(load_pipeline(Path("recipes/tiny/pipeline-full.yaml"), overrides=changes))


def test_members_with_heads_of_their_own_can_be_forced() -> None:
    changes = _OWN_HEADS | {"warm": {"force": True}}
    assert check.check(load_pipeline(Path("recipes/tiny/pipeline-full.yaml"), overrides=changes))


def test_dropout_that_is_off_and_empty_sets_of_pairs_are_refused(reward_recipe: Recipe, tmp_path: Path) -> None:
    """Members that say they differ in dropout would be the same."""
    member = reward_recipe | LORA | {"lora_dropout": 0.1}
    reward.COMMAND.build(member | {"disable_dropout": False})
    with pytest.raises(UserError, match=r"lora_dropout 0\.1 does nothing while disable_dropout is true"):
        reward.COMMAND.build(member)
    for name in ("reward_models", "flipped_datasets", "shifted_datasets"):
        with pytest.raises(UserError, match=f"{name} is empty; write one or more"):
            warm.COMMAND.build(warm_recipe(["a", "b"], reward_recipe, tmp_path) | {name: []})


def test_policies_of_one_name_are_refused(reward_recipe: Recipe, tmp_path: Path) -> None:
    """Their answers and metrics are told apart by it."""
    recipe = warm_recipe(["a", "b"], reward_recipe, tmp_path) | {"policies": ["one/sft", "two/sft"]}
    with pytest.raises(UserError, match="policies: two folders have the same name, sft; rename one"):
        warm.COMMAND.build(recipe)


def test_a_check_knows_what_reward_models_are_for(
    reward_recipe: Recipe, reward_model_dir: Path, tmp_path: Path
) -> None:
    """Those that are there already, and the shape of a mean that is still to be made."""
    assert not [
        job.label for job in check.check(load_pipeline(Path("recipes/tiny/pipeline-full.yaml"))) if job.unknown
    ]
    recipe = reward_recipe | {"score_head": str(reward_model_dir), "output_dir": str(tmp_path / "run" / "reward")}
    path = write(tmp_path, {"reward": {"recipe": "reward.yaml"}}, reward=recipe)
    (job,) = check.check(load_pipeline(path))
    assert job.checked.models["score_head"].hidden_size == load_config(TEACHER).hidden_size
