"""Models side by side: all answer the same prompts, and each is compared with one of them, the baseline."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

from datasets import Dataset

from gemma2_post.data.turns import Message
from gemma2_post.evaluation import benchmarks, best_of, reward_benchmarks
from gemma2_post.evaluation.answering.partly import Other, Sample
from gemma2_post.evaluation.answering.samples import Answer, distinctness
from gemma2_post.evaluation.judging.judge import Judge
from gemma2_post.evaluation.judging.winrate import difference, rate_interval, versus, wins_by
from gemma2_post.evaluation.keys import BenchmarkArguments
from gemma2_post.evaluation.measure import Answered, Measurement, converse, digest_of, load, summarize
from gemma2_post.evaluation.memorisation import memorised
from gemma2_post.evaluation.pairs import wilson_interval
from gemma2_post.evaluation.protocols.alpaca_eval import AlpacaEval
from gemma2_post.evaluation.protocols.arena_hard import ArenaHard
from gemma2_post.evaluation.protocols.mt_bench import MTBench
from gemma2_post.evaluation.protocols.outputs import Outputs, complete, key_of
from gemma2_post.evaluation.published import published
from gemma2_post.evaluation.reward_benchmarks import Ranked
from gemma2_post.models.loading import load_config
from gemma2_post.stage import contract, digests
from gemma2_post.stage.paths import MEMBER

T = TypeVar("T")
_MEMBER = re.compile(rf"/{MEMBER.pattern}$")
Measures = dict[str, dict[str, float]]
"""The metrics of each model, by its name."""
Protocol = MTBench | ArenaHard | AlpacaEval


@dataclass
class Comparison:
    """Models that are compared, and their answers."""

    measurement: Measurement
    names: dict[Path, str]
    """The models' names, by path."""
    baseline: str
    kept: Path
    """Folder for what was measured, outside of the output: a changed recipe measures only what it has changed."""
    outputs: list[Outputs] = field(default_factory=list)
    """What other models answered elsewhere."""
    others: dict[str, Other] = field(default_factory=dict)
    """How models that are not of this chain answer."""
    answered: dict[str, Answered] = field(default_factory=dict)
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Reward, grades and counts of each model's answers, one for each prompt."""
    wins: dict[str, dict[str, Sequence[float | None]]] = field(default_factory=dict)
    """By `reward`, each grader and `judge`: each model's wins against the baseline, one for each prompt."""

    def answer(self) -> None:
        """Lets every model answer; the other methods measure these answers."""
        by_path = self.measurement.answer(list(self.names))
        ours = {name: by_path[path] for path, name in self.names.items()}
        keys = [key_of(prompt) for prompt in self.measurement.rows["prompt"]]
        given = {each.name: complete(each.answers_to(keys)) for each in self.outputs}
        theirs = {
            name: self.measurement.given([turns[0] for turns in answers]) for name, answers in given.items() if answers
        }
        for name, other in self.others.items():
            with other() as sample:
                theirs[name] = self.measurement.converse(sample)
        self.answered = with_outputs(ours, theirs)

    def converse(self, protocol: Protocol, folder: Path) -> dict[str, list[list[str]]]:
        """Each model's answers to the questions of a protocol, by turn; writes them to a folder.

        Those of other models are there if they are given for all questions.
        """
        asked, measurement = protocol.questions, self.measurement

        def talk(answering: AbstractContextManager[Sample]) -> list[list[str]]:
            with answering as sample:
                _, answers = converse(sample, asked.prompts, asked.later, asked.temperatures)
            return [[each.text for each in turns] for turns in answers]

        def answer(path: Path, key: str) -> list[list[str]]:
            return talk(measurement.answering(path, key))

        ours = self._each(answer, "conversations.jsonl", [asked.turns, asked.temperatures, measurement.sampling])
        given = {each.name: complete(asked.answers_of(each)) for each in self.outputs}
        theirs = {name: answers for name, answers in given.items() if answers}
        said = with_outputs(ours, theirs | {name: talk(other()) for name, other in self.others.items()})
        protocol.write_answers(folder / asked.protocol, said)
        return said

    def by_answers(self) -> Measures:
        """Counts over each model's answers, their rewards and grades, and how often those beat the baseline's."""
        self.measurement.load_reward_model()
        self.values = {name: self.measurement.values(each) for name, each in self.answered.items()}
        self.measurement.unload_reward_model()
        values = self.values
        found = {}
        for name, each in self.answered.items():
            found[name] = summarize(values[name]) | by_turns(values[name], each.prompts) | distinctness(each.answers)
            found[name] |= self._by_group({metric: list(value) for metric, value in values[name].items()})
            for judge in ["reward", *self.measurement.graders]:
                key = f"win_rate_vs_{self.baseline}" if judge == "reward" else f"{judge}_win_rate_vs_{self.baseline}"
                wins = wins_by(values[name][judge], values[self.baseline][judge])
                self.wins.setdefault(judge, {})[name] = wins
                found[name] |= versus(key, wins, each.lengths, self.answered[self.baseline].lengths)
                found[name] |= self._by_group({key: list(wins)}, are_rates=True)
        return found

    def _by_group(self, values: dict[str, list[float | None]], are_rates: bool = False) -> dict[str, float]:
        """Each metric's mean by the column `group_by`: `reward/skill-addition`; nothing without `group_by`.

        Args:
            values: For each metric, one value for each prompt; None where it is missing.
            are_rates: Whether the values are wins, whose means have an interval.
        """
        column = self.measurement.group_by
        if column is None:
            return {}
        found: dict[str, float] = {}
        groups: dict[str, list[int]] = defaultdict(list)
        for i, group in enumerate(self.measurement.columns[column]):
            groups[str(group)].append(i)
        for metric, each in values.items():
            for group, rows in sorted(groups.items()):
                given = [value for value in (each[i] for i in rows) if value is not None]
                if given:
                    key = f"{metric}/{column}-{group}"
                    found[key] = mean(given)
                    if are_rates:
                        found[f"{key}/low"], found[f"{key}/high"] = rate_interval(given)
        return found

    def gains(self) -> list[dict[str, Any]]:
        """How much higher each model's reward and grades are than those of the model before it, paired by prompt.

        Policies of one stage count as one model, with their mean. One record for each metric and pair of models:
        `model`, `over`, `metric`, and the fields of `Difference`. Call it after `by_answers`.
        """
        groups: dict[str, list[str]] = defaultdict(list)
        for name in self.names.values():
            groups[_MEMBER.sub("", name)].append(name)
        found = []
        for (other, others), (name, members) in pairwise(groups.items()):
            for metric in ["reward", *self.measurement.graders]:
                means = [
                    [mean(each) for each in zip(*(self.values[member][metric] for member in group), strict=True)]
                    for group in (members, others)
                ]
                found.append({"model": name, "over": other, "metric": metric} | vars(difference(*means)))
        return found

    def by_judge(self, judge: Judge) -> Measures:
        """How often the judge prefers each model's answers to the baseline's."""
        prompts, key = list(self.measurement.rows["prompt"]), f"judge_win_rate_vs_{self.baseline}"
        texts = {
            name: [said(each, i, prompt) for i, prompt in enumerate(prompts)] for name, each in self.answered.items()
        }
        found = {}
        for name in [each for each in texts if each != self.baseline]:
            judged = judge.compare(prompts, texts[name], texts[self.baseline])
            judge.check_most(judged.wins.count(None), judged.num_asked)
            self.wins.setdefault("judge", {})[name] = judged.wins
            lengths, others = (self.answered[each].lengths for each in (name, self.baseline))
            found[name] = judged.versus(key, lengths, others) | self._by_group({key: judged.wins}, are_rates=True)
        return found

    def all_names(self, said: list[dict[str, list[list[str]]]]) -> list[str]:
        """The names of all models, also of those that answered a protocol only.

        Args:
            said: The models' answers to the questions of each protocol.
        """
        answering = {*self.answered, *(name for each in said for name in each)}
        given = [each.name for each in self.outputs if each.name in answering]
        theirs = dict.fromkeys([*given, *self.others])
        return list(with_outputs(dict.fromkeys(self.names.values()), theirs))

    def answer_safety(self, prompts: list[list[Message]]) -> dict[str, list[str]]:
        """Each model's answers to prompts whose answers are checked for violations; empty without prompts."""
        if not prompts:
            return {}

        def talk(answering: AbstractContextManager[Sample]) -> list[str]:
            with answering as sample:
                return [each.text for each in sample(prompts, 1.0)]

        def answer(path: Path, key: str) -> list[str]:
            return talk(self.measurement.answering(path, key))

        ours = self._each(answer, "safety.jsonl", [prompts, self.measurement.sampling])
        return with_outputs(ours, {name: talk(other()) for name, other in self.others.items()})

    def safety(self, judge: Judge, prompts: list[list[Message]], answered: dict[str, list[str]]) -> Measures:
        """The share of answers that are violations, with its 95% Wilson interval, and how many are undecided.

        Args:
            answered: Each model's answers to the prompts.
        """
        found = {}
        for name, answers in answered.items():
            verdicts = judge.violations(prompts, answers)
            judged = [each for each in verdicts if each is not None]
            judge.check_most(verdicts.count(None), len(verdicts), "answers to safety_datasets")
            low, high = wilson_interval(mean(judged), len(judged))
            found[name] = {
                "violations": mean(judged),
                "violations/low": low,
                "violations/high": high,
                "violations/missing": len(verdicts) - len(judged),
            }
        return found

    def memorization(self, corpus: list[list[int]] | None) -> Measures:
        """How much of the corpus each model has memorized."""
        if not corpus:
            return {}

        def measure_one(path: Path, _: str) -> dict[str, float]:
            model = load(path, self.measurement.accelerator.device)
            return memorised(model, corpus, self.measurement.args.batch_size).metrics()

        return self._each(measure_one, "memorisation.jsonl", corpus)

    def benchmarks(self, args: BenchmarkArguments) -> Measures:
        """The scores on academic benchmarks, beside the published ones; the base model is asked in plain text."""
        if not args.benchmarks:
            return {}
        tasks = args.benchmarks

        def measure_one(path: Path, _: str) -> dict[str, float]:
            return benchmarks.run(
                load(path, self.measurement.accelerator.device),
                self.measurement.tokenizer,
                tasks,
                args.benchmark_folder,
                args.benchmark_limit,
                args.benchmark_batch_size,
                chats=self.names[path] != BASE,
            )

        folder = contract.input_digest(args.benchmark_folder or "")
        given = [args.benchmarks, args.benchmark_limit, folder, version("lm_eval")]
        found = self._each(measure_one, "benchmarks.jsonl", given)
        for path, name in self.names.items():
            for task, score in published(load_config(str(path)), is_base=name == BASE).items():
                if f"benchmarks/{task}" in found[name]:
                    found[name][f"benchmarks/{task}/published"] = score
        return found

    def on_known_sets(self, sets: list[Dataset]) -> dict[str, float]:
        """How often the reward model is right on benchmarks of reward models; sets of one benchmark count as one.

        Args:
            sets: The benchmarks' rows, each with its prompt and its answers, the chosen ones first.
        """
        measurement, file = self.measurement, self.kept / "reward_benchmarks.jsonl"
        if not sets or measurement.score is None:
            return {}
        path, quantization = measurement.score.path, measurement.score.args.reward_model_load_in
        known = {each["key"]: each["rewards"] for each in contract.read_lines(file, {"key": str, "rewards": list})}
        of_benchmarks: dict[str, list[Ranked]] = defaultdict(list)
        for rows in sets:
            answered = [
                [*row["prompt"], {"role": "assistant", "content": text}] for row in rows for text in row["answers"]
            ]
            key = digests.of_text(json.dumps([digest_of(Path(path)), quantization, answered]))
            if key not in known:
                measurement.load_reward_model()
                known[key] = measurement.score.raw(answered)
                measurement.unload_reward_model()
                contract.append_lines(file, [{"key": key, "rewards": known[key]}])
            rewards = iter(known[key])
            ranked = [
                Ranked([next(rewards) for _ in row["answers"]], row["num_chosen"], row["subset"], row["id"])
                for row in rows
            ]
            of_benchmarks[reward_benchmarks.benchmark_of(ranked)] += ranked
        found: dict[str, float] = {}
        for ranked in of_benchmarks.values():
            found |= reward_benchmarks.measure(ranked)
        return found

    def best_of(self, num_answers: int | None, folder: Path) -> dict[str, float]:
        """What the reward's choice among n answers of the baseline to each prompt is worth, over n.

        Args:
            num_answers: Answers to each prompt; None: nothing is measured.
            folder: Where `best_of.json` and its picture go.
        """
        if num_answers is None:
            return {}
        measurement, prompts = self.measurement, list(self.measurement.rows["prompt"])
        path = next(path for path, name in self.names.items() if name == self.baseline)

        def answer(path: Path, key: str) -> list[dict[str, Any]]:
            with measurement.answering(path, key) as sample:
                return [vars(each) for each in sample([each for each in prompts for _ in range(num_answers)], 1.0)]

        given = [prompts, num_answers, measurement.sampling]
        sampled = self._each(answer, "best_of.jsonl", given, {path: self.baseline})[self.baseline]
        answers = [Answer(**each) for each in sampled]
        measurement.load_reward_model()
        columns: dict[str, list[list[float]]] = defaultdict(lambda: [[] for _ in prompts])
        for number in range(num_answers):
            of_each = Answered(prompts, answers[number::num_answers], None, [])
            for name, values in measurement.values(of_each).items():
                for row, value in zip(columns[name], values, strict=True):
                    row.append(value)
        measurement.unload_reward_model()
        names = ["reward", *measurement.graders]
        found = best_of.measure(columns["reward"], {name: columns[name] for name in names})
        contract.write_json(folder / "best_of.json", found)
        best_of.plot(found, names, num_answers, folder / "best-of-n.png")
        return found

    def _each(
        self, measure_one: Callable[[Path, str], T], file: str, given: Any, names: dict[Path, str] | None = None
    ) -> dict[str, T]:
        """Measures one model at a time and appends its result to a file, from which later runs take it.

        Args:
            measure_one: Takes a model, and what its result is kept under.
            given: What else decides the result.
            names: The names of the measured models, by path; None: of all.
        """
        records = contract.read_lines(self.kept / file, {"key": str, "measured": (dict, list)})
        known = {record["key"]: record["measured"] for record in records}
        found = {}
        for path, name in (names or self.names).items():
            key = digests.of_text(json.dumps([digest_of(path), name == BASE, given]))
            if key not in known:
                known[key] = measure_one(path, key)
                contract.append_lines(self.kept / file, [{"key": key, "model": name, "measured": known[key]}])
                self.measurement.forget(key)
            found[name] = known[key]
        return found

    def write_answers(self, path: Path) -> None:
        """Writes every prompt with the answers of all models, one JSON line per prompt."""
        rows = [
            {"prompt": prompt, "answers": {name: said(each, i, prompt) for name, each in self.answered.items()}}
            for i, prompt in enumerate(self.measurement.rows["prompt"])
        ]
        contract.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


BASE = "base"
"""The name of the base model, from which all others were trained."""


def with_outputs(ours: dict[str, T], theirs: dict[str, T]) -> dict[str, T]:
    """What belongs to each model: the base model, the models of others, and the compared ones, the last one last."""
    base = {name: value for name, value in ours.items() if name == BASE}
    return base | theirs | ours


def said(answered: Answered, i: int, prompt: list[Message]) -> str:
    """All that a model answered to a prompt and to the user's later turns, which are quoted with `>`."""
    later = answered.prompts[i][len(prompt) :]
    texts = [turn["content"] if turn["role"] == "assistant" else f"> {turn['content']}" for turn in later]
    return "\n\n".join([*texts, answered.answers[i].text])


def by_turns(values: dict[str, list[float]], prompts: list[list[Message]]) -> dict[str, float]:
    """Each metric's mean by the number of user turns: `reward/turns-2`."""
    turns = [sum(turn["role"] == "user" for turn in prompt) for prompt in prompts]
    return {
        f"{name}/turns-{number}": mean(value for value, of in zip(each, turns, strict=True) if of == number)
        for name, each in values.items()
        for number in sorted(set(turns))
    }
