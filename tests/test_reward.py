"""The reward stage on a small random model, and its loader: what must be equal is equal, the rest is refused."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import RewardTrainer

from gemma2_post import reward
from gemma2_post.evaluation import policies
from gemma2_post.evaluation.answering.samples import sample_answers
from gemma2_post.evaluation.pairs import ScoredPair, measure_pairs, rank_correlation, rank_correlation_ceiling
from gemma2_post.models import reward_model
from gemma2_post.models.saving import save_model
from gemma2_post.models.templates import INFERENCE_TEMPLATE
from gemma2_post.models.tokenizer import save_tokenizer
from gemma2_post.models.tokens import PAD
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError, located
from gemma2_post.tiny.data import noise_ceiling
from gemma2_post.tiny.gold import gold
from gemma2_post.training import run as training
from tests.conftest import BASE, TEACHER, losses, only_one_at_a_time
from tests.test_bad_input import MODEL, USER, make_adapter, with_model, with_rows, with_values
from tests.test_distill import add_a_token, metrics_of, same_weights, swap_two_tokens

Run = Callable[[dict[str, object]], Path]
Recipe = dict[str, object]
Change = Callable[[Recipe, Path], Recipe]

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
QLORA = {**LORA, "load_in_4bit": True, "dtype": "bfloat16"}
METHODS = {"full": {}, "lora": LORA, "qlora": QLORA}
GOLD = {"graders": ["gemma2_post.tiny.gold:gold"], "noise_ceiling": "gemma2_post.tiny.data:noise_ceiling"}


class Start:
    """A trainer before its first step, and the parameters that it begins with."""

    def __init__(self, trainer: RewardTrainer) -> None:
        self.trainer = trainer
        self.parameters = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        (self.head,) = (
            value for name, value in self.parameters.items() if "score" in name and "original_module" not in name
        )


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Start]:
    """Of the runs that follow."""
    seen, run = [], training.run

    def remember_and_run(*arguments: object) -> None:
        seen.append(Start(arguments[2]))
        run(*arguments)

    monkeypatch.setattr(training, "run", remember_and_run)
    return seen


def held_out(recipe: Recipe) -> list[dict]:
    return [json.loads(line) for line in Path(recipe["held_out_datasets"][0]["path"]).read_text().splitlines()]


def conversations(rows: list[dict]) -> list[list[dict[str, str]]]:
    return [[*row["prompt"], *row[side]] for side in ("chosen", "rejected") for row in rows]


def make_reward_model(
    model_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    scale: float = 1.0,
    spread: float = 2.0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A reward model with a random head, saved and sealed as the stage does it."""
    set_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_dir, num_labels=1, dtype=torch.float32, pad_token_id=PAD
    )
    torch.nn.init.normal_(model.score.weight, std=scale)
    save_model(model, model.state_dict(), directory, dtype)
    save_tokenizer(tokenizer, directory)
    canary = [[USER, MODEL], [USER, MODEL, USER, MODEL | {"content": "Hello again, and good-bye."}]]
    reward_model.seal(directory, tokenizer, canary, 0.5, spread, max_length=192, device=torch.device("cpu"))
    return directory


# --- what comes out ---


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_the_score_head_is_trained_and_saved_in_fp32(
    method: Recipe, run_reward: Run, reward_recipe: Recipe, model_dir: Path, starts: list[Start]
) -> None:
    """Also where all else is saved in bf16; what `Auto` loads then is complete and is what was saved."""
    output = run_reward(reward_recipe | method | {"save_dtype": "bfloat16"})
    ((head, trained),) = [(each.head, Start(each.trainer).head) for each in starts]
    weights = load_file(output / "model.safetensors")
    assert weights.keys() == {*load_file(model_dir / "model.safetensors"), "score.weight"}
    saved = weights.pop("score.weight")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert trained.dtype == saved.dtype == torch.float32 and saved.shape == (1, 64)
    assert (trained - head.float()).abs().min() > 1e-4  # two steps of Adam of 1e-3
    assert not torch.equal(saved, saved.bfloat16().float())
    assert torch.equal(saved, trained)
    if method:
        adapter = load_file(output / "adapter" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
        assert {name.split(".")[-3] for name in adapter} == {"model", "q_proj", "k_proj", "v_proj", "o_proj"}
        assert torch.equal(adapter["base_model.model.score.weight"], trained)
        assert all(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)

    model, info = AutoModelForSequenceClassification.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (model.config.num_labels, model.config.pad_token_id, model.config.eos_token_id) == (1, 0, 1)
    assert model.config.architectures == ["Gemma2ForSequenceClassification"]
    assert not (output / "generation_config.json").exists()
    stage = json.loads((output / "stage.json").read_text())
    assert stage["metrics"] == metrics_of(output) and stage["adapter"] == ("adapter" if method else None)
    for name in ("calibration.png", "turns.png"):
        assert (output / name).read_bytes()[1:4] == b"PNG"
    assert AutoTokenizer.from_pretrained(output).chat_template == INFERENCE_TEMPLATE
    assert isinstance(reward_model.load(str(output)).model.score, reward_model.ScoreHead)


@pytest.mark.slow
@pytest.mark.parametrize("method", [LORA, QLORA], ids=["lora", "qlora"])
def test_a_merged_adapter_is_the_adapter_on_the_unquantised_base(
    method: Recipe, run_reward: Run, reward_recipe: Recipe, model_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    output = run_reward(reward_recipe | method | {"learning_rate": 1e-2})
    base = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1, dtype=torch.float32)
    base.config.pad_token_id = PAD
    chats = conversations(held_out(reward_recipe))
    before = reward_model.score(base, tokenizer, chats)
    attached = reward_model.score(PeftModel.from_pretrained(base, output / "adapter"), tokenizer, chats)
    merged = reward_model.load(str(output))
    assert reward_model.score(merged.model, tokenizer, chats) == pytest.approx(attached, abs=1e-5)
    with pytest.raises(UserError, match="adapter is an adapter, not a model; merge it into its base first"):
        reward_model.load(str(output / "adapter"))
    assert numpy.abs(numpy.subtract(attached, before)).min() > 1e-3
    untouched = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(
        load_file(output / "model.safetensors")[untouched],
        load_file(model_dir / "model.safetensors")[untouched].float(),
    )


@pytest.mark.slow
def test_4_bit_weights_are_not_repacked_when_they_are_measured(
    run_reward: Run, reward_recipe: Recipe, starts: list[Start]
) -> None:
    run_reward(reward_recipe | QLORA | {"max_steps": 1})
    model = starts[0].trainer.model
    modules = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(modules) == 14 and not any(module.support_avx512bf16_for_cpu for module in modules)
    assert type(model.base_model.model.score.modules_to_save["default"]) is reward_model.ScoreHead


@pytest.mark.slow
def test_the_head_follows_from_the_seed_alone(
    run_reward: Run, reward_recipe: Recipe, tmp_path: Path, starts: list[Start]
) -> None:
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(100 + i)
        run_reward(reward_recipe | {"seed": seed, "max_steps": 1, "output_dir": str(tmp_path / f"{i}")})
    first, again, other = (start.head for start in starts)
    assert torch.equal(first, again) and not torch.equal(first, other)


# --- what is measured ---


@pytest.mark.slow
def test_everything_that_is_measured_is_what_the_saved_model_says(
    run_reward: Run, reward_recipe: Recipe, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "load_model", only_one_at_a_time(policies.load_model))
    answering = {"max_new_tokens": 12, "num_samples": 8, "policies": [BASE, TEACHER], "seed": 3}
    output = run_reward(reward_recipe | GOLD | answering)
    metrics = metrics_of(output)
    loaded = reward_model.load(str(output), tokenizer)
    rows = held_out(reward_recipe)
    chats = conversations(rows)
    scores = reward_model.score(loaded.model, tokenizer, chats)
    lengths = [len(reward_model.conversation_ids(tokenizer, chat)) for chat in chats]
    half = len(rows)
    pairs = [
        ScoredPair(scores[i], scores[half + i], (len(row["prompt"]) + 1) // 2, lengths[i], lengths[half + i])
        for i, row in enumerate(rows)
    ]
    expected = measure_pairs(pairs) | {"noise_ceiling": noise_ceiling(rows)}

    rewards, grades = {}, {}
    for path in (BASE, TEACHER):
        policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        prompts = [row["prompt"] for row in rows[:8]]
        answers = [each.text for each in sample_answers(policy, tokenizer, prompts, 12, batch_size=4, seed=3)]
        answered = [
            [*prompt, {"role": "assistant", "content": text}] for prompt, text in zip(prompts, answers, strict=True)
        ]
        name = Path(path).name
        rewards[name] = reward_model.score(loaded.model, tokenizer, answered)
        grades[name] = gold(answers, [row["answer"] for row in rows[:8]])
        expected[f"gold_rank_correlation/{name}"] = rank_correlation(rewards[name], grades[name])
        expected[f"gold_rank_correlation_ceiling/{name}"] = rank_correlation_ceiling(grades[name])
    both = [[*values["base"], *values["teacher"]] for values in (rewards, grades)]
    expected["gold_rank_correlation"] = rank_correlation(*both)
    expected["gold_rank_correlation_ceiling"] = rank_correlation_ceiling(both[1])
    measured = list(expected)
    expected |= {"answer_reward_mean": numpy.mean(both[0]), "answer_reward_spread": numpy.std(both[0])}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert metrics.keys() == {
        *(f"{name}{when}" for name in measured for when in ("", "_before")),
        *("answer_reward_mean", "answer_reward_spread", "tokens_per_second", "peak_memory_gb"),
    }
    assert (loaded.mean, loaded.spread) == (metrics["answer_reward_mean"], metrics["answer_reward_spread"])
    assert loaded.max_length == 256 and metrics["noise_ceiling_before"] == metrics["noise_ceiling"]
    canary = json.loads((output / "reward_model.json").read_text())["canary"]
    assert [each["messages"] for each in canary] == chats[:4]
    assert [each["score"] for each in canary] == pytest.approx(scores[:4], abs=1e-5)


def test_without_policies_rewards_are_normalised_with_the_answers_of_the_pairs(
    run_reward: Run, reward_recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> None:
    output = run_reward(reward_recipe | {"num_samples": 0})
    loaded = reward_model.load(str(output))
    scores = reward_model.score(loaded.model, tokenizer, conversations(held_out(reward_recipe)))
    assert (loaded.mean, loaded.spread) == pytest.approx((numpy.mean(scores), numpy.std(scores)), rel=1e-4)
    metrics = metrics_of(output)
    assert (metrics["reward_mean"], metrics["reward_spread"]) == pytest.approx((loaded.mean, loaded.spread))
    assert not any("rank_correlation" in name or "noise_ceiling" in name for name in metrics)


@pytest.mark.slow
def test_a_reward_does_not_depend_on_padding_on_the_batch_or_on_being_saved(
    run_reward: Run, reward_recipe: Recipe, tokenizer: PreTrainedTokenizerBase, starts: list[Start]
) -> None:
    output = run_reward(reward_recipe)
    chats = conversations(held_out(reward_recipe))
    trained = starts[0].trainer.model.train()
    expected = reward_model.score(trained, tokenizer, chats)
    assert trained.training and numpy.std(expected) > 0.1
    loaded = reward_model.load(str(output), tokenizer).model
    plain = AutoModelForSequenceClassification.from_pretrained(output)
    for model in (loaded, plain):
        for batch_size in (1, 5, 16, 100):
            assert reward_model.score(model, tokenizer, chats, batch_size) == pytest.approx(expected, abs=1e-5)
        for side in ("left", "right"):
            settings = {"padding": True, "return_dict": True, "return_tensors": "pt"}
            batch = tokenizer.apply_chat_template(chats, **settings, tokenizer_kwargs={"padding_side": side})
            assert batch["attention_mask"][:, 0 if side == "left" else -1].min() == 0
            with torch.no_grad():
                scores = model(**batch).logits[:, 0].tolist()
            assert scores == pytest.approx(expected, abs=1e-5), side


def test_the_score_is_in_fp32_whatever_the_model_computes_in(
    model_dir: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    head = reward_model.ScoreHead(64, 1, bias=False, dtype=torch.bfloat16)
    hidden = 3 * torch.randn(200, 64, dtype=torch.bfloat16)
    exact = hidden.double() @ head.weight[0].double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, coarse = head(hidden)[:, 0], torch.nn.Linear.forward(head, hidden)[:, 0]
    assert scores.dtype == torch.float32 and coarse.dtype == torch.bfloat16
    assert (scores - exact).abs().max() < 1e-5 < 1e-3 < (coarse.double() - exact).abs().max()

    large = make_reward_model(model_dir, tokenizer, tmp_path / "large", scale=40.0)
    model = AutoModelForSequenceClassification.from_pretrained(large, dtype=torch.bfloat16)
    chats = [[USER | {"content": f"What is {i} plus 1?"}, MODEL] for i in range(64)]
    rounded = reward_model.score(model, tokenizer, chats)
    loaded = reward_model.load(str(large)).model.to(torch.bfloat16)
    fine = reward_model.score(loaded, tokenizer, chats)
    assert torch.tensor(rounded).bfloat16().tolist() == rounded and numpy.abs(rounded).max() > 16
    assert torch.tensor(fine).bfloat16().tolist() != fine
    assert len(set(rounded)) < len(set(fine)) == 64


# --- training ---


@pytest.mark.slow
def test_the_first_loss_is_bradley_terry_with_margin_and_centring(
    run_reward: Run, reward_recipe: Recipe, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, starts: list[Start]
) -> None:
    """All eight rows are one batch; in float64, one row at a time, with the last token's hidden state."""
    rows = Path(reward_recipe["datasets"][0]["path"]).read_text().splitlines()[:8]
    rows = [json.loads(row) | {"score_chosen": i, "score_rejected": i - 2} for i, row in enumerate(rows)]
    (tmp_path / "eight.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"datasets": [{"path": str(tmp_path / "eight.jsonl")}], "max_steps": 1, "score_margin": 0.25}
    (first,) = losses(run_reward(reward_recipe | values | {"center_rewards_coefficient": 0.3}))

    model = AutoModelForCausalLM.from_pretrained(reward_recipe["model_name_or_path"], dtype=torch.float64).model
    (start,) = starts
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.float(), start.parameters[f"model.{name}"])

    def score(messages: list[dict[str, str]]) -> torch.Tensor:
        ids = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return model(input_ids=ids).last_hidden_state[0, -1] @ start.head[0].double()

    chosen, rejected = torch.stack([score(chat) for chat in conversations(rows)]).chunk(2)
    margin = torch.tensor([row["margin"] + 0.5 for row in rows], dtype=torch.float64)
    assert len(set(margin.tolist())) == 2
    expected = -torch.nn.functional.logsigmoid(chosen - rejected - margin).mean()
    expected += 0.3 * (chosen + rejected).square().mean()
    assert first == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", [{}, QLORA], ids=["full", "qlora"])
def test_resumed_equals_uninterrupted(method: Recipe, run_reward: Run, reward_recipe: Recipe, tmp_path: Path) -> None:
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    values = reward_recipe | changes | method
    whole = run_reward(values)
    interrupted = tmp_path / "interrupted"
    interrupted.mkdir()
    # What a killed run leaves behind: its claim, what it measured before the first step, and a checkpoint.
    (whole / "checkpoint-2").rename(interrupted / "checkpoint-2")
    (whole / "before.json").rename(interrupted / "before.json")
    stage = json.loads((whole / "stage.json").read_text())
    contract.begin(interrupted, stage["fingerprint"])

    torch.manual_seed(7)
    resumed = run_reward(values | {"output_dir": str(interrupted)})
    assert len(set(losses(whole))) == 4 and losses(resumed) == losses(whole)
    assert same_weights(whole, resumed)
    assert (resumed / "reward_model.json").read_bytes() == (whole / "reward_model.json").read_bytes()
    assert json.loads((resumed / "stage.json").read_text())["output"] == stage["output"]


@pytest.mark.slow
def test_eight_pairs_at_once_are_two_pairs_four_times(run_reward: Run, reward_recipe: Recipe, tmp_path: Path) -> None:
    together = run_reward(reward_recipe)
    apart = run_reward(reward_recipe | {"per_device_train_batch_size": 2, "output_dir": str(tmp_path / "apart")})
    assert losses(apart) == pytest.approx(losses(together), rel=1e-4)
    first, second = (load_file(output / "model.safetensors") for output in (together, apart))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=2e-4, rtol=0)  # a fifth of one Adam step of 1e-3


def test_turns_are_balanced_and_long_pairs_left_out(
    run_reward: Run, reward_recipe: Recipe, tokenizer: PreTrainedTokenizerBase, starts: list[Start]
) -> None:
    """Of the sixteen pairs seven are of several turns, one of them too long."""
    values = {"multi_turn_share": 0.25, "max_length": 80, "max_too_long_share": 0.3}
    run_reward(reward_recipe | values | {"max_steps": 1})
    (start,) = starts
    rows = [json.loads(row) for row in Path(reward_recipe["datasets"][0]["path"]).read_text().splitlines()]
    ids = [reward_model.conversation_ids(tokenizer, [*row["prompt"], *row["chosen"]]) for row in rows]
    others = [reward_model.conversation_ids(tokenizer, [*row["prompt"], *row["rejected"]]) for row in rows]
    turns = [len(row["prompt"]) // 2 + 1 for row in rows]
    fits = [len(first) <= 80 and len(second) <= 80 for first, second in zip(ids, others, strict=True)]
    assert [turn for turn in turns if turn > 1] == [3, 2, 3, 3, 3, 2, 3] and sum(fits) == 15
    used = [ids.index(each) for each in start.trainer.train_dataset["chosen_ids"]]
    assert sorted(set(used)) == used and all(fits[row] for row in used)
    assert [sum(turns[row] > 1 for row in used), len(used)] == [3, 12]


@pytest.mark.slow
def test_harmless_transcripts_train_with_the_stand_in_gemma_tokenizer(
    run_reward: Run, reward_recipe: Recipe, model_dir: Path, real_data: Path, tmp_path: Path
) -> None:
    """A hundred real pairs of several turns, on a vocabulary of 2,048 pieces."""
    config = AutoConfig.from_pretrained(model_dir, vocab_size=2048)
    directory = tmp_path / "standin"
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for file in (real_data / "tokenizer" / "standin-gemma2").glob("tokenizer*.json"):
        shutil.copy(file, directory)
    lines = (real_data / "preference" / "hh-rlhf" / "harmless-base-test.first1156.jsonl").read_text().splitlines()
    (tmp_path / "some.jsonl").write_text("\n".join(lines[50:150]) + "\n")
    output = run_reward(
        {key: value for key, value in reward_recipe.items() if key not in ("held_out_datasets", "columns")}
        | {"model_name_or_path": str(directory), "datasets": [{"path": str(tmp_path / "some.jsonl")}]}
        | {"max_steps": 8, "max_too_long_share": 0.7, "max_invalid_share": 0.01, "held_out_share": 0.2}
    )
    metrics = metrics_of(output)
    assert metrics["reward_mean"] != metrics["reward_mean_before"] and 0 <= metrics["accuracy"] <= 1
    assert {"accuracy/turns/1", "accuracy_multi_turn"} <= metrics.keys()
    assert reward_model.load(str(output)).max_length == 256


# --- the loader ---


def edit_json(name: str, **values: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(content | values))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    return edit


def random_head(weights: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(1)
    weights["score.weight"] = torch.randn_like(weights["score.weight"])


def other_body(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.up_proj.weight"] *= -1


def no_head(weights: dict[str, torch.Tensor]) -> None:
    del weights["score.weight"]


def two_heads(weights: dict[str, torch.Tensor]) -> None:
    weights["score.weight"] = weights["score.weight"].repeat(2, 1)


def two_labels(directory: Path) -> None:
    edit_json("config.json", id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})(directory)
    edit_weights(two_heads)(directory)


def causal(directory: Path) -> None:
    """A language model, to which the seal of a reward model has been copied."""
    (directory / "model.safetensors").unlink()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(TEACHER) / name, directory)


def cut_file(directory: Path) -> None:
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights[: len(weights) // 2])


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a causal model": (causal, "is a language model, not a reward model; name the output of the reward stage"),
    "an adapter": (make_adapter, "is an adapter, not a model; merge it into its base first"),
    "an unfinished stage": (lambda directory: (directory / "begun.json").write_text("{}"), "is not finished; run the"),
    "no seal": (
        lambda directory: (directory / "reward_model.json").unlink(),
        "has no reward_model.json, so nothing says that its score head was trained; name the output of the reward",
    ),
    "no head": (edit_weights(no_head), "lacks score.weight; train the reward model again"),
    "two labels": (two_labels, "has 2 labels and pad id 0, not 1 and 0; train the reward model again"),
    "two labels in the config alone": (
        edit_json("config.json", id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1}),
        "train the reward model again",
    ),
    "no pad id": (
        edit_json("config.json", pad_token_id=None),
        "has 1 labels and pad id None, not 1 and 0; train the reward",
    ),
    "another head": (edit_weights(random_head), "when it was made; its files have changed, train the reward model"),
    "a head of nothing": (
        edit_weights(lambda weights: weights["score.weight"].mul_(float("nan"))),
        "scores its canary nan, but ",
    ),
    "another body": (edit_weights(other_body), "when it was made; its files have changed, train the reward model"),
    "half a file": (cut_file, "model.safetensors cannot be read: it has"),
    "another tokenizer": (swap_two_tokens, "was trained with another tokenizer than the policy's (or than this"),
    "another template": (
        edit_json("reward_model.json", template_digest="0123456789abcdef"),
        "was trained with another template than the policy's (or than this version's); train the reward model again",
    ),
    "no tokenizer": (lambda directory: (directory / "tokenizer.json").unlink(), "has no tokenizer.json"),
}


def test_a_reward_model_loads_as_it_was(model_dir: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    directory = make_reward_model(model_dir, tokenizer, tmp_path / "reward")
    sealed = json.loads((directory / "reward_model.json").read_text())
    for policy_tokenizer in (None, tokenizer):
        loaded = reward_model.load(str(directory), policy_tokenizer)
        assert (loaded.mean, loaded.spread, loaded.max_length) == (0.5, 2.0, 192)
        assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab() and not loaded.model.training
        assert loaded.model.config._attn_implementation == "eager" and loaded.model.score.weight.dtype == torch.float32
        chats = [each["messages"] for each in sealed["canary"]]
        scores = [each["score"] for each in sealed["canary"]]
        assert reward_model.score(loaded.model, loaded.tokenizer, chats) == pytest.approx(scores, abs=1e-5)
    weights = load_file(directory / "model.safetensors")
    (ids,) = tokenizer.apply_chat_template([chats[1]], return_dict=True)["input_ids"]
    hidden = loaded.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    assert tokenizer.decode(ids[-2:]) == "<end_of_turn>\n"
    assert scores[1] == pytest.approx((hidden @ weights["score.weight"][0]).item(), abs=1e-5)


@pytest.mark.parametrize(("quantization", "kind"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_a_quantized_reward_model_scores_as_its_quantized_matrices_do(
    quantization: str, kind: str, model_dir: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The head stays exact; another head is still noticed."""
    directory = make_reward_model(model_dir, tokenizer, tmp_path / "reward", scale=0.2)
    whole = reward_model.load(str(directory))
    found = reward_model.load(str(directory), quantization=quantization, device=torch.device("cpu"))
    quantized = {name: each for name, each in found.model.named_modules() if type(each).__name__ == kind}
    assert len(quantized) == 7 * whole.model.config.num_hidden_layers
    assert found.model.score.weight.dtype == torch.float32 and not found.model.training
    assert not any(parameter.requires_grad for parameter in found.model.parameters())
    chats = [[USER, MODEL], [USER, MODEL | {"content": "Another answer."}]]
    scores = reward_model.score(found.model, tokenizer, chats)
    exact = reward_model.score(whole.model, tokenizer, chats)
    assert scores != exact and scores == pytest.approx(exact, abs=0.5 * whole.spread)
    if quantization == "4bit":
        modules = dict(whole.model.named_modules())
        for name, module in quantized.items():
            values = dequantize_4bit(module.weight.data, module.weight.quant_state)
            modules[name].weight.data = values.to(torch.float32)
        assert reward_model.score(whole.model, tokenizer, chats) == pytest.approx(scores, abs=1e-4)
    edit_weights(random_head)(directory)
    with pytest.raises(UserError, match="when it was made; its files have changed"):
        reward_model.load(str(directory), quantization=quantization, device=torch.device("cpu"))


@pytest.mark.parametrize("spread", [0.0, 0.05, 2.0])
def test_a_model_saved_in_bf16_loads_however_alike_the_answers_were_that_it_was_normalised_with(
    spread: float, model_dir: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """It is sealed in bf16, and loaded in fp32 where there is no GPU: the canary differs by what bf16 rounds away."""
    directory = make_reward_model(model_dir, tokenizer, tmp_path / "reward", spread=spread, dtype=torch.bfloat16)
    assert reward_model.load(str(directory)).spread == spread


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_finished_reward_model_is_refused(
    change: Callable[[Path], object], message: str, model_dir: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    directory = make_reward_model(model_dir, tokenizer, tmp_path / "reward")
    change(directory)
    with pytest.raises(UserError) as refused, located("recipe"):
        reward_model.load(str(directory))
    assert str(refused.value).startswith("recipe: ") and str(directory) in str(refused.value)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_policy_with_another_tokenizer_is_refused(
    model_dir: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    directory = make_reward_model(model_dir, tokenizer, tmp_path / "reward")
    policy = shutil.copytree(BASE, tmp_path / "policy")
    swap_two_tokens(policy)
    policy_tokenizer = AutoTokenizer.from_pretrained(policy)
    policy_tokenizer.chat_template = INFERENCE_TEMPLATE
    with pytest.raises(UserError, match="reward was trained with another tokenizer than the policy's"):
        reward_model.load(str(directory), policy_tokenizer)
    policy_tokenizer = AutoTokenizer.from_pretrained(BASE)
    policy_tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(UserError, match="reward was trained with another template than the policy's"):
        reward_model.load(str(directory), policy_tokenizer)


# --- mistakes ---


def with_pair(**changes: object) -> Change:
    """Two pairs, of which the second is changed."""
    row = {"prompt": [USER], "chosen": [MODEL], "rejected": [MODEL | {"content": "Go."}], "score_chosen": None}
    return with_pairs(row, row | changes)


def with_pairs(*rows: Recipe, **values: object) -> Change:
    write = with_rows(list(rows))
    return lambda recipe, folder: write(recipe, folder) | {"columns": None} | values


def with_policy(*change_policies: Callable[[Path], object]) -> Change:
    def change(recipe: Recipe, folder: Path) -> Recipe:
        paths = []
        for i, change_policy in enumerate(change_policies):
            paths.append(shutil.copytree(TEACHER, folder / f"policy{i}"))
            change_policy(paths[-1])
        return recipe | {"policies": [str(path) for path in paths]}

    return change


def two_of_one_name(recipe: Recipe, folder: Path) -> Recipe:
    paths = [shutil.copytree(path, folder / run / "sft") for run, path in (("one", BASE), ("two", TEACHER))]
    return recipe | {"policies": [str(path) for path in paths]}


def without_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


TIES = [{"prompt": "Hi", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 1}] * 3
BAD: dict[str, tuple[Change, str]] = {
    "chosen equals rejected": (with_pair(rejected=[MODEL]), "bad.jsonl: row 1: chosen and rejected are the same ans"),
    "other prompts": (
        with_pairs({"chosen": [USER, MODEL], "rejected": [USER | {"content": "Ho"}, MODEL]}),
        "bad.jsonl: row 0: chosen and rejected answer different prompts; only the model's last turn may differ",
    ),
    "an empty answer": (with_pair(chosen=[MODEL | {"content": " "}]), "row 1: chosen: the content of turn 1 is empty"),
    "candidates": (
        with_pairs({"prompt": "Hi", "chosen": ["a"], "rejected": ["b", "c"]}),
        "row 0: chosen holds 1 candidates; give one chosen and one rejected answer",
    ),
    "a score of text": (with_pair(score_chosen="x"), "row 1: score_chosen is 'x', not a number"),
    "ties alone": (with_pairs(*TIES), "datasets: all 3 pairs are ties (equal scores); give pairs that differ"),
    "prompts alone": (
        with_pairs({"prompt": "Hi"}),
        "the columns prompt are of no known format; expected chosen + rej",
    ),
    "all too long": (with_values(max_length=3), "all 16 pairs are longer than max_length 3 tokens; raise max_length"),
    "longer than the model": (
        with_values(max_length=512),
        "max_length is 512, more than the 256 positions of the mod",
    ),
    "no share": (with_values(multi_turn_share=1.5), "multi_turn_share is 1.5; write a number above 0, below 1"),
    "a share of one kind": (
        with_pairs(*(row | {"score_chosen": 2} for row in TIES), multi_turn_share=0.5),
        "multi_turn_share needs single- and multi-turn pairs, found 3 and 0; remove it",
    ),
    "a column that is not there": (with_values(columns=["gold"]), "columns: no source has gold"),
    "an adapter as base": (with_model(make_adapter), "broken is an adapter, not a model"),
    "a base without weights": (with_model(without_weights), "broken has no model.safetensors"),
    "full fine-tuning in 4 bit": (with_values(load_in_4bit=True), "load_in_4bit is for adapters"),
    "no such noise ceiling": (
        with_values(noise_ceiling="gemma2_post.tiny.data:silence"),
        "gemma2_post.tiny.data:silence: there is no such function",
    ),
    "a noise ceiling of columns that are not kept": (
        with_values(**GOLD, columns=["answer"], policies=[TEACHER]),
        "gemma2_post.tiny.data:noise_ceiling",
    ),
    "no such grader": (
        with_values(graders=["gemma2_post.tiny.gold:silver"], policies=[TEACHER]),
        "silver: there is no such function",
    ),
    "less than no samples": (with_values(num_samples=-1), "num_samples is -1; write 0 or more"),
    "policies that answer nothing": (with_values(policies=[BASE], num_samples=0), "num_samples is 0"),
    "an adapter as policy": (with_policy(make_adapter), "policy0 is an adapter, not a model"),
    "an unfinished policy": (
        with_policy(lambda directory: (directory / "begun.json").write_text("{}")),
        "policy0 is not finished; run the stage that makes it",
    ),
    "a policy with other ids": (
        with_policy(swap_two_tokens),
        "policies: {folder}/policy0 has another tokenizer than the reward model's base; choose models with the same",
    ),
    "a policy with a larger vocabulary": (with_policy(add_a_token), "policy0 has another tokenizer than the reward"),
    "a policy without weights": (with_policy(without_weights), "policy0 has no model.safetensors"),
    "a policy that is nowhere": (with_values(policies=["./nowhere"]), "there is no folder ./nowhere"),
    "a second policy that is an adapter": (with_policy(lambda _: None, make_adapter), "policy1 is an adapter"),
    "two policies of one name": (two_of_one_name, "policies: "),
    "the task type": (
        with_values(use_peft=True, lora_task_type="CAUSAL_LM"),
        "lora_task_type must not be set: it is always SEQ_CLS, with the score head trained",
    ),
    "modules to save": (
        with_values(use_peft=True, lora_modules_to_save=["lm_head"]),
        "lora_modules_to_save must not be set: the score head is always trained and saved",
    ),
    "unused columns": (with_values(remove_unused_columns=False), "remove_unused_columns must not be set: the trainer"),
    "a group": (with_values(group_by="answer"), "group_by must not be set: accuracy is broken down by turns"),
    "fp16": (with_values(fp16=True), "fp16 must not be set: Gemma 2 overflows in fp16"),
    "an unknown key": (with_values(max_prompt_length=9), "unknown key max_prompt_length"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_a_mistake_is_one_sentence_with_status_2_and_touches_nothing(
    change: Change,
    message: str,
    reward_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(change(reward_recipe, tmp_path)))
    monkeypatch.setattr(sys, "argv", ["reward", "--config", str(file)])
    with pytest.raises(SystemExit) as stopped:
        reward.COMMAND.launch()
    assert stopped.value.code == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message.format(folder=tmp_path) in sentence and str(file) in sentence
    assert not Path(reward_recipe["output_dir"]).exists()
