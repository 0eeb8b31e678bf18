"""The keys of a recipe that curates data."""

import re
from dataclasses import dataclass
from typing import Literal

from gemma2_post.data.keys import Source
from gemma2_post.evaluation.keys import JudgeArguments
from gemma2_post.stage.bounds import COUNT, FILLED, SEED, SHARE, Bounds
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.paths import FilePath, ModelPath
from gemma2_post.stage.recipe import Effect, key, part

Kind = Literal["conversations", "pairs", "prompts"]
"""What rows are read as: by sft, by reward, by rlhf."""
Keep = Literal["first", "highest_reward", "longest", "shortest"]
"""Which of several rows stays; of equal ones the first, in the order of the sources."""
Treatment = Literal["remove", "replace"]
RULES = (
    "invalid",
    "exact_duplicate",
    "near_duplicate",
    "too_many_answers",
    "contaminated",
    "sensitive_information",
    "personal_information",
    "pattern",
    "self_identification",
    "unsafe",
    "low_reward",
    "refusal",
    "hedging",
    "weight",
)
"""The rules, in the order in which they are applied; a row is removed by the first one that it breaks."""


@dataclass
class MixtureArguments:
    """The mixture that is curated."""

    datasets: list[Source] = key(
        help="Sources of the mixture, the preferred ones first: path, split, name, revision, weight.", bounds=FILLED
    )
    rows: Kind | None = key(None, "What its rows are; None: what the first rows of all sources are.")
    columns: list[str] | None = key(None, "Columns kept beside what is said, for graders and group_by.")
    max_invalid_share: float = key(
        1.0, "Rows that are invalid are removed; a larger share of them in a source is an error.", bounds=SHARE
    )
    seed: int = key(0, "Seed of what is drawn at random.", bounds=SEED)


@dataclass
class DuplicateArguments:
    """Rows that repeat others."""

    exact_duplicates: bool = key(True, "Removes rows that say the same but for case and white space.")
    near_duplicate_edits: float | None = key(
        0.1,
        "Removes rows that edits of at most this share of the words would make the same; None for none.",
        bounds=Bounds(at_least=0, at_most=0.15),
    )
    max_answers_per_prompt: int | None = key(
        None, "Rows that may begin with the same first prompt, or a near-duplicate one.", bounds=COUNT
    )
    keep: Keep = key("first", "Which of several such rows stays; of equal ones, the first.")
    reward_column: str | None = key(None, "Column with the reward of a row, for keep and min_reward.")

    def check(self) -> None:
        """Refuses a choice by rewards that rows do not have."""
        if self.keep == "highest_reward" and not self.reward_column:
            raise UserError("keep is highest_reward, and no reward_column says what it is; name one")


@dataclass
class DecontaminationArguments:
    """What must stay out of the mixture."""

    evaluation_sets: list[Source] | None = key(
        None, "Sources of prompts that models are tested on; rows that hold them are removed.", bounds=FILLED
    )
    benchmarks: list[str] | None = key(
        None, "Tasks of lm-eval whose questions must stay out, too; [preset] for those of evaluate."
    )
    benchmark_folder: FilePath | None = key(None, "Folder with more tasks as lm-eval's YAML.")
    overlap_words: int = key(8, "Words of the sequences that are compared.", bounds=Bounds(at_least=3))
    max_overlap: float = key(
        0.5, "Share of a prompt's sequences from which a row holds it.", bounds=Bounds(above=0, at_most=1)
    )
    near_prompt_edits: float | None = key(
        0.1,
        "Also removes rows whose first prompt differs from one of them in at most this share of the words.",
        bounds=Bounds(at_least=0, at_most=0.15),
    )

    def check(self) -> None:
        """Refuses keys that would do nothing."""
        if self.benchmark_folder and not self.benchmarks:
            raise UserError("benchmark_folder does nothing without benchmarks; name its tasks there")


@dataclass
class PersonalArguments:
    """What rows say about people, and patterns of the recipe's own."""

    sensitive_information: Treatment | None = key(
        "remove", "Cards, accounts, national ids, secrets: removes such rows, replaces what is found, or None."
    )
    personal_information: Treatment | None = key(
        "replace", "E-mail, phone and IP addresses, streets: removes such rows, replaces what is found, or None."
    )
    countries: list[str] | None = key(
        None, "Countries, in two letters, whose phone numbers and ids are known; None for the usual.", bounds=FILLED
    )
    patterns: list[str] | None = key(None, "Regular expressions; rows in which one of them matches are removed.")

    def check(self) -> None:
        """Refuses a pattern that does not compile."""
        for number, each in enumerate(self.patterns or []):
            try:
                re.compile(each)
            except re.error as error:
                raise UserError(f"patterns[{number}]: {each!r} does not compile ({error}); correct it") from error


@dataclass
class IdentityArguments:
    """Assistants that say that they are somebody else."""

    self_identification: bool = key(True, "Removes rows whose assistant says that it is, or was made by, another.")
    assistant_name: str = key("", "The name that it may call itself.")
    assistant_maker: str = key("", "Who it may say has made it.")


@dataclass
class QualityArguments:
    """How good answers must be, and how many of them may refuse."""

    reward_model: ModelPath | None = key(None, "Finished output of the reward stage, for min_reward.")
    reward_batch_size: int = key(32, "Conversations that it reads at once.", effect=Effect.NONE, bounds=COUNT)
    min_reward: float | None = key(
        None, "Removes conversations with a lower reward, by the reward model or the reward_column."
    )
    max_refusal_share: float | None = key(
        None, "Share of the remaining rows whose last answer may refuse; the others are removed.", bounds=SHARE
    )
    max_hedging_share: float | None = key(
        None, "Share of the remaining rows whose last answer may hedge; the others are removed.", bounds=SHARE
    )

    def check(self, reward_column: str | None) -> None:
        """Refuses a limit without rewards, and rewards without a use."""
        if self.min_reward is not None and not (self.reward_model or reward_column):
            raise UserError("min_reward has no rewards to compare; name a reward_model, or a reward_column")
        if self.reward_model and self.min_reward is None:
            raise UserError("reward_model does nothing without min_reward; set it, or remove the model")
        if self.reward_model and reward_column:
            raise UserError("reward_model and reward_column both say what a row is worth; remove one of them")


@dataclass(kw_only=True)
class CurationArguments:
    """The rules, in the order in which they are applied."""

    duplicates: DuplicateArguments = part(DuplicateArguments)
    outside: DecontaminationArguments = part(DecontaminationArguments)
    personal: PersonalArguments = part(PersonalArguments)
    identity: IdentityArguments = part(IdentityArguments)
    judging: JudgeArguments = part(JudgeArguments)
    quality: QualityArguments = part(QualityArguments)
    tokenizer: ModelPath | None = key(
        None, "A model whose tokens the lengths are counted in; without one, words.", effect=Effect.MEASUREMENTS
    )

    def check(self) -> None:
        """Refuses keys that cannot work together."""
        self.duplicates.check()
        self.outside.check()
        self.personal.check()
        self.judging.check()
        self.quality.check(self.duplicates.reward_column)
