"""Greedy soups (arXiv 2203.05482, section 2, recipe 1): which members of a merge to keep, by answers to prompts."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from statistics import mean

from gemma2_post.evaluation.measure import Measurement
from gemma2_post.stage import contract
from gemma2_post.weights.points import Merge, merge_to, write_beside

FILE = "greedy.json"
"""What was tried: the members of each merge, its measure, and whether it was kept."""


def greedy(number: int, value_of: Callable[[list[int]], float]) -> list[int]:
    """The members to merge: the best one, then each next best one whose addition does not lower the merge's value.

    Args:
        number: Number of members.
        value_of: The measure of the merge of some of them, in ascending order; called once for each merge.
    """
    alone = [value_of([i]) for i in range(number)]
    best, *others = sorted(range(number), key=lambda i: -alone[i])
    kept, value = [best], alone[best]
    for i in others:
        wider = sorted([*kept, i])
        if (found := value_of(wider)) >= value:
            kept, value = wider, found
    return kept


def of_best(merge: Merge, by: str, measurement: Measurement) -> Merge:
    """The merge without the members that a greedy soup leaves out; writes `greedy.json`.

    Args:
        by: `reward`, or the name of a grader.
    """
    names, tried = merge.args.names, []

    def value_of(members: list[int]) -> float:
        folder = merge.output_dir / contract.PROGRESS / "soup"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        some, rule = subset(merge, members), merge.args.interpolation
        merge_to({1.0: folder}, some, rule)
        write_beside(folder, some, rule, 1.0)
        answered = measurement.answer([folder])[folder]
        measurement.load_reward_model()
        value = mean(measurement.values(answered)[by])
        measurement.unload_reward_model()
        tried.append({"members": [names[i] for i in members], by: value})
        return value

    kept = greedy(len(names), value_of)
    shutil.rmtree(merge.output_dir / contract.PROGRESS / "soup")
    contract.write_json(merge.output_dir / FILE, {"kept": [names[i] for i in kept], "tried": tried})
    return subset(merge, kept)


def subset(merge: Merge, members: list[int]) -> Merge:
    """The merge of some of its members."""
    args = replace(merge.args, policies=[merge.args.names[i] for i in members])
    policies = [merge.policies[i] for i in members if merge.policies]
    adapters = [merge.adapters[i] for i in members if merge.adapters]
    return replace(merge, args=args, policies=policies, adapters=adapters)
