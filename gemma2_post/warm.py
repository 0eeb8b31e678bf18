"""WARM: reward models that were trained from one start become one, by the mean of their weights.

Reads finished reward models that began with one score head (`score_head`) and differ in the order of pairs, learning
rate, dropout, or the model that they began as; writes the mean of their weights (arXiv 2401.12187), a reward model,
sealed again. LoRA adapters on one base are averaged exactly, any others as whole models. The mean is compared with
each member and with the mean of their scores: on held-out pairs (`datasets`), on pairs that were trained on with
flipped labels (`flipped_datasets`; to agree with them is to have memorized noise), and out of distribution
(`shifted_datasets`).

    python -m gemma2_post.warm --config recipes/tiny/warm.yaml
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gemma2_post.data.keys import DataArguments, Source
from gemma2_post.data.pairs import PAIR
from gemma2_post.evaluation.keys import REFUSED, SampleArguments
from gemma2_post.evaluation.memory import compute_of
from gemma2_post.models import cost
from gemma2_post.models import work as passes
from gemma2_post.models.shapes import num_parameters
from gemma2_post.stage import card, contract
from gemma2_post.stage.bounds import COUNT, FILLED, SEED
from gemma2_post.stage.command import Checked, Command, Parts, Stage
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.launcher import Launcher
from gemma2_post.stage.paths import ModelPath, check_names
from gemma2_post.stage.recipe import key, part
from gemma2_post.stage.work import Pass, Rows, times

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(kw_only=True)
class Recipe:
    """The keys of an average of reward models."""

    reward_models: list[ModelPath] = key(
        help="What is averaged: folders of reward models, or the folder of an entry's members.", bounds=FILLED
    )
    output_dir: str = key(help="Folder of the output.")
    save_dtype: Literal["float32", "bfloat16"] = key("bfloat16", "Type of the saved weights, rounded to once.")
    force: bool = key(False, "Also average reward models that did not begin with one score head.")
    data: DataArguments = part(DataArguments)
    flipped_datasets: list[Source] | None = key(
        None, "Pairs that members were trained on and whose labels are wrong.", bounds=FILLED
    )
    shifted_datasets: list[Source] | None = key(
        None, "Pairs of another distribution than those of the training.", bounds=FILLED
    )
    samples: SampleArguments = part(SampleArguments)
    policies: list[ModelPath] | None = key(
        None, "Models whose answers to held-out prompts are scored, for normalization and for graders."
    )
    max_new_tokens: int = key(256, "Longest answer of a policy, in tokens.", bounds=COUNT)
    batch_size: int = key(32, "Conversations read, or prompts answered, at once.", bounds=COUNT)
    seed: int = key(0, "Seed of the sampling and of the mixture of data sets.", bounds=SEED)

    @property
    def sets_of_pairs(self) -> dict[str, list[Source]]:
        """The sources of each set of pairs that is scored."""
        sets = {"held out": self.data.datasets, "flipped": self.flipped_datasets, "shifted": self.shifted_datasets}
        return {name: sources for name, sources in sets.items() if sources}


def main(stage: Stage, recipe: Recipe) -> None:
    """Averages, lets the mean and its members score everything, one model at a time, and seals the mean."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from gemma2_post.evaluation import averages, policies
    from gemma2_post.evaluation.answering.samples import rows_to_answer
    from gemma2_post.evaluation.pairs import both_of, measure_pairs
    from gemma2_post.models import reward_model
    from gemma2_post.weights.average import open_average

    average = open_average(recipe.reward_models, stage.fingerprint["inputs"], recipe.force)
    sealed = [reward_model.check(name) for name in recipe.reward_models]
    tokenizer = reward_model.tokenizer_of(recipe.reward_models[0])
    max_length = min(each["max_length"] for each in sealed)
    rows = read_pairs(recipe, tokenizer, max_length)
    held_out = rows[averages.HELD_OUT]
    to_answer, graders = rows_to_answer(recipe.samples, held_out)
    names, prompts = recipe.policies or [], to_answer["prompt"]
    policies.check_tokenizers(names, tokenizer)
    contract.begin_afresh(stage.output_dir, stage.fingerprint)
    disable_progress_bar()  # there would be one for each model that is loaded
    device, size = torch.device("cuda" if torch.cuda.is_available() else "cpu"), recipe.batch_size
    answers = {
        Path(name).name: policies.answer(name, device, tokenizer, prompts, recipe.max_new_tokens, size, recipe.seed)
        for name in names
    }
    average.write(stage.output_dir, recipe.save_dtype)
    folders = {averages.MEAN: stage.output_dir} | {
        f"member-{i}": Path(name) for i, name in enumerate(recipe.reward_models)
    }
    scores = {}
    for name, folder in folders.items():
        model = reward_model.read(str(folder)).to(device).eval()
        scores[name] = {of: policies.score_pairs(model, pairs, size) for of, pairs in rows.items()}
        if name == averages.MEAN:
            rewards = policies.score_answers(model, tokenizer, prompts, answers, size)
        del model  # the next one would be loaded beside it
    metrics = measure_pairs(scores[averages.MEAN][averages.HELD_OUT]) | averages.compare_all(scores, stage.output_dir)
    metrics |= policies.rank_correlations(to_answer, answers, rewards, graders)
    rewards = rewards or {"pairs": both_of(scores[averages.MEAN][averages.HELD_OUT])}
    canary = [[*row["prompt"], *row["chosen"]] for row in held_out.select(range(min(4, len(held_out))))]
    mean, spread = reward_model.mean_and_spread(rewards.values())
    metrics |= {"answer_reward_mean": mean, "answer_reward_spread": spread}
    reward_model.seal(stage.output_dir, tokenizer, canary, mean, spread, max_length, device)
    how = "exactly, as adapters on one base" if average.adapters else "as whole models"
    account = (
        f"The mean of the weights of {len(recipe.reward_models)} reward models "
        f"([WARM](https://arxiv.org/abs/2401.12187)), {how}. Its weights are {recipe.save_dtype}."
    )
    card.begin(stage.output_dir, "warm", recipe.reward_models[0], "warm", account)
    done = contract.read_done(Path(recipe.reward_models[0])) or {}
    facts = {name: done[name] for name in _FACTS} | {"adapter": None, "dtype": recipe.save_dtype}
    gain = f"{metrics['gain_over_members']:+.3f} over its members"
    stage.finish(facts, metrics, f"accuracy {metrics['accuracy']:.3g}, {gain}")


def read_pairs(recipe: Recipe, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> "dict[str, Dataset]":
    """The sets of pairs, tokenized, without ties and pairs that are too long."""
    from gemma2_post.data.mixture import load_rows
    from gemma2_post.data.preparation import drop_ties, drop_too_long

    args, found = recipe.data, {}
    for name, sources in recipe.sets_of_pairs.items():
        columns = args.columns if sources is args.datasets else None
        settings = args.max_invalid_share, recipe.seed, columns
        key = "datasets" if sources is args.datasets else f"{name}_datasets"
        rows = drop_ties(load_rows(sources, *settings, row_format=PAIR, tokenizer=tokenizer), key)
        found[name] = drop_too_long(rows, "the members' max_length", max_length, args.max_too_long_share).dataset()
    return found


_FACTS = ("base_model", "base_revision", "base_digest", "tokenizer_digest", "template_digest")
"""What a stage file says about a reward model, for the stages that read it."""


def check(recipe: Recipe, launcher: Launcher) -> None:
    if launcher.num_processes > 1:
        raise UserError("warm is one process; start it with accelerate_configs/single_gpu.yaml or cpu.yaml")
    if recipe.samples.graders and not recipe.policies:
        raise UserError("graders grade what policies answer, and there are none; add policies")
    if recipe.policies and not recipe.samples.num_samples:
        raise UserError("num_samples is 0, so the policies answer nothing; raise it, or remove policies")
    check_names("policies", recipe.policies or [])


def metrics(recipe: Recipe) -> set[str]:
    from gemma2_post.evaluation import averages
    from gemma2_post.evaluation.pairs import PAIR_METRICS

    sets = recipe.sets_of_pairs
    found = {averages.named(metric, name) for name in sets for metric in averages.METRICS}
    found |= {f"{name}_rank_correlation{of}" for name in recipe.samples.grader_names for of in ("", "_ceiling")}
    return found | PAIR_METRICS | {"answer_reward_mean", "answer_reward_spread"}


def memory(checked: Checked[Recipe]) -> dict[str, Parts]:
    recipe, compute, config = checked.recipe, compute_of(checked), checked.models["reward_models"]
    assert config is not None, "the planner asks only about models whose shapes it knows"
    length = config.max_position_embeddings
    scoring = {"weights": cost.weights(config, compute.itemsize)}
    phases = {"scoring": scoring | {"activations": cost.forward(config, recipe.batch_size, length, compute)}}
    if policy := checked.models.get("policies"):
        answering = cost.sampling(policy, recipe.batch_size, length, recipe.max_new_tokens, compute)
        phases["answers of policies"] = {"policies": cost.weights(policy, compute.itemsize)} | answering
    return phases


def work(checked: Checked[Recipe], rows: Rows) -> list[Pass]:
    """The held-out pairs, scored by all models, and answers of policies, by the mean; other pairs are not counted."""
    recipe, compute, config = checked.recipe, compute_of(checked), checked.models["reward_models"]
    assert config is not None, "the planner asks only about models whose shapes it knows"
    model, number = passes.Model(config, compute), recipe.samples.num_samples
    lengths = rows.conversations_up_to(config.max_position_embeddings)
    prompts, answers = rows.prompts_up_to(config.max_position_embeddings), rows.answers_up_to(recipe.max_new_tokens)
    pairs = passes.reading(model, 2 * rows.number, recipe.batch_size, lengths)
    found = times(1 + len(recipe.reward_models), [pairs])
    for _ in recipe.policies or []:
        policy = checked.models["policies"]
        assert policy is not None, "the planner asks only about models whose shapes it knows"
        found += passes.sampling(passes.Model(policy, compute), number, recipe.batch_size, prompts, answers)
        found.append(passes.reading(model, number, recipe.batch_size, prompts.plus(answers)))
    return found


def disk(checked: Checked[Recipe]) -> tuple[float, float]:
    config = checked.models["reward_models"]
    assert config is not None, "the planner asks only about models whose shapes it knows"
    return num_parameters(config) * (cost.FP32 if checked.recipe.save_dtype == "float32" else cost.BF16), 0


COMMAND = Command(
    "warm",
    Recipe,
    main,
    metrics,
    check,
    refused=REFUSED | {"group_by": "the numbers are not broken down by a column here; remove it"},
    row_formats={"datasets": PAIR, "flipped_datasets": PAIR, "shifted_datasets": PAIR},
    headline=["accuracy"],
    below_gate="look at members.png: is a member broken, and did all begin with one score head?",
    pictures={"members.png": "Is the mean of the weights as often right as each member, and as the mean of scores?"},
    needed_models=["reward_models", "policies"],
    memory=memory,
    disk=disk,
    work=work,
)

if __name__ == "__main__":
    COMMAND.launch()
