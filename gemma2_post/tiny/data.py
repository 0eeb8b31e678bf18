"""The data of the tiny world, generated from fixed seeds: demonstrations, preference pairs, prompts.

In a recipe, write `path: gemma2_post.tiny.data:demonstrations` with `split: train` or `split: held_out`. The content
of a held-out conversation (number pair, fact, name, favorite, list of words) never occurs in a training conversation;
single words (for example an animal) can occur in both, in other roles.
"""

import math
from random import Random
from typing import Any

from gemma2_post.stage.errors import UserError
from gemma2_post.tiny.gold import gold_score
from gemma2_post.tiny.world import MANNERS, SKILLS, Task, make_task, reply

NUM_ROWS = {
    "demonstrations": {"train": 6000, "held_out": 480},
    "preferences": {"train": 6000, "held_out": 960},
    "prompts": {"train": 6000, "held_out": 480},
}

# Like human demonstrations: mostly right, not always kind, not always short.
DEMONSTRATION_MANNERS = {"friendly": 0.35, "plain": 0.30, "verbose": 0.20, "rude": 0.15}
DEMONSTRATION_RIGHT = 0.85
PREFERENCE_SHARPNESS = 4.0
"""Inverse temperature of the Bradley-Terry labels: P(a over b) = sigmoid(4 (gold(a) - gold(b)))."""


def _tasks(kind: str, split: str) -> tuple[Random, list[Task]]:
    if split not in NUM_ROWS[kind]:
        raise UserError(f"gemma2_post.tiny.data: {kind} has no split {split}; write train or held_out")
    random = Random(f"{kind} {split}")
    num_rows = NUM_ROWS[kind][split]
    tasks = [make_task(SKILLS[i % len(SKILLS)], random, held_out=split == "held_out") for i in range(num_rows)]
    random.shuffle(tasks)
    return random, tasks


def _with_reply(task: Task, text: str) -> dict[str, object]:
    messages = [*task.messages, {"role": "assistant", "content": text}]
    return {"messages": messages, "skill": task.skill, "answer": task.answer}


def demonstrations(split: str) -> list[dict[str, object]]:
    """`messages` of mixed quality, with `skill` and `answer` to grade what a model says in place of the last turn."""
    random, tasks = _tasks("demonstrations", split)
    manners = random.choices(list(DEMONSTRATION_MANNERS), list(DEMONSTRATION_MANNERS.values()), k=len(tasks))
    return [
        _with_reply(task, reply(task, manner, random.random() < DEMONSTRATION_RIGHT, random))
        for task, manner in zip(tasks, manners, strict=True)
    ]


def ideal_demonstrations(split: str) -> list[dict[str, object]]:
    """`messages` that are all right and friendly, which the teacher was trained on."""
    random, tasks = _tasks("demonstrations", split)
    return [_with_reply(task, reply(task, "friendly", True, random)) for task in tasks]


def preference_probability(gold: float, other_gold: float) -> float:
    """Bradley-Terry probability that a reply with the first score is preferred to one with the second."""
    return 1 / (1 + math.exp(-PREFERENCE_SHARPNESS * (gold - other_gold)))


def preferences(split: str) -> list[dict[str, object]]:
    """`prompt`, `chosen`, `rejected` (lists of messages), and both gold scores.

    The labels are sampled from Bradley-Terry on gold, so no reward model can be right about all pairs; the best
    possible accuracy is the mean of the better reply's `preference_probability` (`noise_ceiling`).
    """
    random, tasks = _tasks("preferences", split)
    rows = []
    for task in tasks:
        texts = [reply(task, random.choice(MANNERS), random.random() < 0.6, random) for _ in range(2)]
        while texts[0] == texts[1]:
            texts[1] = reply(task, random.choice(MANNERS), random.random() < 0.6, random)
        scored = [(text, gold_score(text, task.answer)) for text in texts]
        if random.random() > preference_probability(scored[0][1], scored[1][1]):
            scored.reverse()
        (chosen, chosen_gold), (rejected, rejected_gold) = scored
        rows.append(
            {
                "prompt": list(task.messages),
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "chosen_gold": chosen_gold,
                "rejected_gold": rejected_gold,
                "skill": task.skill,
                "answer": task.answer,
            }
        )
    return rows


def noise_ceiling(rows: list[dict[str, Any]]) -> float:
    """The expected accuracy of the gold reward itself on these pairs."""
    gaps = [abs(row["chosen_gold"] - row["rejected_gold"]) for row in rows]
    return sum(preference_probability(gap, 0.0) for gap in gaps) / len(gaps)


def prompts(split: str) -> list[dict[str, object]]:
    """`prompt` (messages that end with a user turn), `skill` and `answer`."""
    _, tasks = _tasks("prompts", split)
    return [{"prompt": list(task.messages), "skill": task.skill, "answer": task.answer} for task in tasks]
