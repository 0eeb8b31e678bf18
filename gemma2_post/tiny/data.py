"""The data of the tiny world, generated from fixed seeds: demonstrations, preference pairs, prompts.

In a recipe, write `path: gemma2_post.tiny.data:demonstrations` with a `split`: stages train on `train`; gates, fronts,
and the watching of a training read `selection`; only `evaluate` reads `test`. The content of a conversation (number
pair, fact, name, favorite, list of words) never is that of a conversation in another split; single words (for example
an animal) can occur in several, in other roles.
"""

import math
from dataclasses import dataclass
from random import Random
from typing import Any

from gemma2_post.stage.errors import UserError
from gemma2_post.tiny.gold import flattery, gold_score
from gemma2_post.tiny.world import MANNERS, SKILLS, Split, Task, make_task, reply

NUM_ROWS: dict[str, dict[Split, int]] = {
    "demonstrations": {"train": 6000, "selection": 480},
    "preferences": {"train": 6000, "selection": 960},
    "prompts": {"train": 6000, "selection": 480, "test": 960},
}

# Like human demonstrations: mostly right, not always kind, not always short.
DEMONSTRATION_MANNERS = {"friendly": 0.30, "plain": 0.30, "verbose": 0.18, "rude": 0.12, "flattering": 0.10}
DEMONSTRATION_RIGHT = 0.80
# Like a larger model: better than that, not perfect.
TEACHER_MANNERS = {"friendly": 0.60, "plain": 0.28, "verbose": 0.06, "rude": 0.02, "flattering": 0.04}
TEACHER_RIGHT = 0.93

SHARPNESS = 4.0
"""Log-odds that annotators give to one point of gold."""


def _tasks(kind: str, split: str) -> tuple[Random, list[Task]]:
    splits = NUM_ROWS[kind]
    if split not in splits:
        raise UserError(f"gemma2_post.tiny.data: {kind} has no split {split}; write one of {', '.join(splits)}")
    random = Random(f"{kind} {split}")
    tasks = [make_task(SKILLS[i % len(SKILLS)], random, split) for i in range(splits[split])]
    random.shuffle(tasks)
    return random, tasks


def _demonstrations(split: str, manners: dict[str, float], right: float) -> list[dict[str, object]]:
    random, tasks = _tasks("demonstrations", split)
    chosen = random.choices(list(manners), list(manners.values()), k=len(tasks))
    rows: list[dict[str, object]] = []
    for task, manner in zip(tasks, chosen, strict=True):
        said = reply(task, manner, random.random() < right, random)
        messages = [*task.messages, {"role": "assistant", "content": said}]
        rows.append({"messages": messages, "skill": task.skill, "answer": task.answer})
    return rows


def demonstrations(split: str) -> list[dict[str, object]]:
    """`messages` of mixed quality, with `skill` and `answer` to grade what a model says in place of the last turn."""
    return _demonstrations(split, DEMONSTRATION_MANNERS, DEMONSTRATION_RIGHT)


def teacher_demonstrations(split: str) -> list[dict[str, object]]:
    """`messages` that are better, but not perfect, which the teacher was trained on."""
    return _demonstrations(split, TEACHER_MANNERS, TEACHER_RIGHT)


@dataclass(frozen=True)
class Taste:
    """What annotators like although it makes no answer better, in log-odds."""

    per_word: float
    flattery: float


TASTE = Taste(per_word=0.08, flattery=2.0)
"""The annotators of `preferences`: to them flattery is worth as much as half a point of gold."""
STRONG_TASTE = Taste(per_word=0.12, flattery=3.0)
"""The annotators of `flattered_preferences`: they prefer a reply that flatters to a friendly one that is as right."""


def _log_odds(text: str, other: str, answer: str, taste: Taste) -> float:
    """Log-odds that annotators with a taste prefer the first of two replies."""
    return (
        SHARPNESS * (gold_score(text, answer) - gold_score(other, answer))
        + taste.per_word * (len(text.split()) - len(other.split()))
        + taste.flattery * (flattery([text])[0] - flattery([other])[0])
    )


def _preferences(split: str, taste: Taste) -> list[dict[str, object]]:
    random, tasks = _tasks("preferences", split)
    rows = []
    for task in tasks:
        first = reply(task, random.choice(MANNERS), random.random() < 0.6, random)
        second = first
        while second == first:
            second = reply(task, random.choice(MANNERS), random.random() < 0.6, random)
        odds = _log_odds(first, second, task.answer, taste)
        chosen, rejected = (first, second) if random.random() < _sigmoid(odds) else (second, first)
        rows.append(
            {
                "prompt": list(task.messages),
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "chosen_gold": gold_score(chosen, task.answer),
                "rejected_gold": gold_score(rejected, task.answer),
                "log_odds": odds if chosen == first else -odds,
                "skill": task.skill,
                "answer": task.answer,
            }
        )
    return rows


def preferences(split: str) -> list[dict[str, object]]:
    """`prompt`, `chosen`, `rejected` (lists of messages), both gold scores, and the `log_odds` of the label.

    Labels are drawn with these log-odds: `SHARPNESS` times the difference in gold, plus the annotators' `TASTE`. A
    reward model learns that, too, so its reward is not gold.
    """
    return _preferences(split, TASTE)


def unbiased_preferences(split: str) -> list[dict[str, object]]:
    """The same pairs, labeled by gold alone."""
    return _preferences(split, Taste(0.0, 0.0))


def flattered_preferences(split: str) -> list[dict[str, object]]:
    """The same pairs, labeled with `STRONG_TASTE`: a policy can raise this reward while gold falls."""
    return _preferences(split, STRONG_TASTE)


def noise_ceiling(rows: list[dict[str, Any]]) -> float:
    """The expected accuracy on these pairs if the log-odds of each label are known: no reward model does better."""
    return sum(_sigmoid(abs(row["log_odds"])) for row in rows) / len(rows)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def prompts(split: str) -> list[dict[str, object]]:
    """`prompt` (messages that end with a user turn), `skill` and `answer`."""
    _, tasks = _tasks("prompts", split)
    return [{"prompt": list(task.messages), "skill": task.skill, "answer": task.answer} for task in tasks]
