"""Metrics of a run's models, formatted for readers: tables, win rates, the run in a few numbers."""

from dataclasses import dataclass

from gemma2_post.stage.overrides import in_words

_MEASURES = {
    "reward": ("reward", "{:.2f}"),
    "kl_to_init": ("KL, nats", "{:.2f}"),
    "stop_rate": ("ends by itself", "{:.0%}"),
    "mean_tokens": ("tokens", "{:.1f}"),
    "distinct_bigrams": ("distinct bigrams", "{:.0%}"),
}
"""Title and format of each metric of the answers to held-out prompts, besides the grade."""
_OF_CANDIDATE = {
    *("name", "path", "overrides", "is_tied", "win_rate", "low", "high", "missing", "relative_work", "seconds")
}
"""Keys of a candidate of a selection that are no measures of its answers."""
_COLUMNS = ("reward", "stop_rate", "mean_tokens")
"""The measures of a candidate that come first."""
_FURTHER = {
    "violations": "violations of safety",
    "memorised_exact": "memorized, exactly",
    "memorised_approximate": "memorized, within 10 %",
}


def title(name: str, models: dict[str, dict[str, float]]) -> str:
    """A model's name; `NAME, mean` for the means over its policies."""
    return f"{name}, mean" if any(other.startswith(f"{name}/") for other in models) else name


@dataclass
class Cell:
    """A metric of a model, formatted; empty if the model does not have it."""

    value: str = ""
    interval: str = ""
    """95 % interval."""
    place: float = 0.0
    """Position between the lowest model, 0, and the highest, 1."""


def measures(models: dict[str, dict[str, float]], grader: str | None) -> dict[str, list[Cell]]:
    """The main metrics: a cell for each model, by title; the grade comes first."""
    graded = {grader: (grader, "{:.2f}")} if grader else {}
    measured = {key: each for key, each in (graded | _MEASURES).items() if _is_measured(models, key)}
    return {words: _cells(models, key, form) for key, (words, form) in measured.items()}


def additional(models: dict[str, dict[str, float]], grader: str | None) -> dict[str, list[Cell]]:
    """The additional metrics, in the same form: grades by number of turns, safety, memorization, benchmarks."""
    keys = dict.fromkeys(key for each in models.values() for key in each)
    best = grader if grader and _is_measured(models, grader) else "reward"
    by_turns = [key for key in keys if key.startswith(f"{best}/turns-")]
    found = {}
    for key in by_turns if len(by_turns) > 1 else []:
        turns = key.rpartition("-")[2]
        found[f"{best}, {turns} turn{'s' if turns != '1' else ''}"] = _cells(models, key, "{:.2f}")
    found |= _by_group(models, keys, best)
    for key, words in _FURTHER.items():
        if key in keys:
            found[words] = _cells(models, key, "{:.1%}")
    for key in keys:
        if key.startswith("benchmarks/") and not key.endswith(("/standard_error", "/shots")):
            shots = next((each[f"{key}/shots"] for each in models.values() if f"{key}/shots" in each), None)
            words = key.removeprefix("benchmarks/").replace("/", ", ") + (
                "" if shots is None else f", {shots:.0f}-shot"
            )
            found[words] = _cells(models, key, "{:.1%}")
    return found


def notes(models: dict[str, dict[str, float]]) -> list[str]:
    """What a reader of the tables has to know about benchmarks; nothing if there are none."""
    keys = {key for each in models.values() for key in each if key.startswith("benchmarks/")}
    found = ["Benchmarks are lm-eval's; the base model reads plain text, the other models the chat format."]
    if any(key.endswith("/published") for key in keys):
        found.append(
            "Published: Google's numbers of the base model (model card) and the instruction model (arXiv 2408.00118, "
            "table 17) of this size, with prompts that differ from lm-eval's."
        )
    return found if keys else []


def _by_group(models: dict[str, dict[str, float]], keys: dict[str, None], best: str) -> dict[str, list[Cell]]:
    """Grades and win rates by a column, and MT-Bench's grades by turn and category."""
    found = {}
    for grade in (best, "mt_bench"):
        parts = ("standard_error", "low", "high", "missing", "turns-")
        of_grade = [key for key in keys if key.startswith(f"{grade}/") and not key[len(grade) + 1 :].startswith(parts)]
        for key in [*(["mt_bench"] if grade == "mt_bench" and grade in keys else []), *of_grade]:
            found[_words(key)] = _cells(models, key, "{:.2f}")
    for rate in win_rates(models):
        for key in keys:
            if key.startswith(f"{rate}/") and not key.endswith(_CONTROLLED) and _has_interval(models, key):
                found[_words(key)] = _cells(models, key, "{:.0%}")
    return found


def _words(key: str) -> str:
    """A key in words: `mt_bench/category-math` is `MT-Bench, category math`."""
    name, *parts = key.replace("win_rate_vs_", "wins against ").split("/")
    return ", ".join(
        [name.replace("mt_bench", "MT-Bench").replace("_", " "), *(part.replace("-", " ", 1) for part in parts)]
    )


def _is_measured(models: dict[str, dict[str, float]], key: str) -> bool:
    return any(key in each for each in models.values())


def _cells(models: dict[str, dict[str, float]], key: str, form: str) -> list[Cell]:
    values = [each[key] for each in models.values() if key in each]
    spread = max(values) - min(values) or 1
    return [
        Cell(form.format(each[key]), _interval(each, key, form), (each[key] - min(values)) / spread)
        if key in each
        else Cell()
        for each in models.values()
    ]


def _interval(model: dict[str, float], key: str, form: str) -> str:
    if error := model.get(f"{key}/standard_error"):
        return f"± {form.format(1.96 * error)}"
    if f"{key}/low" in model and model[f"{key}/low"] < model[f"{key}/high"]:
        return f"{form.format(model[f'{key}/low'])} to {form.format(model[f'{key}/high'])}"
    return ""


REWARD, JUDGE = "the reward", "the judge"
_JUDGES = {"": REWARD, "judge_": JUDGE} | {
    f"{key}_": f"{JUDGE} on {name}"
    for key, name in {"mt_bench": "MT-Bench", "arena_hard": "Arena-Hard", "alpaca_eval": "AlpacaEval"}.items()
}
_CONTROLLED = "length_controlled"
_PARTS = ("low", "high", _CONTROLLED, f"{_CONTROLLED}/low", f"{_CONTROLLED}/high", "disagreement")


@dataclass
class Contest:
    """Win rates against the baseline, according to one judge."""

    judge: str
    """`REWARD`, `JUDGE`, also on a protocol, or the name of a grader."""
    baseline: str
    wins: dict[str, dict[str, float]]
    """By model, in percent: rate, low, high and, if known, length_controlled with its own low and high, and a judge's
    disagreement; and `missing`, the number of pairs without a verdict, of those `asked`."""

    @property
    def is_judged(self) -> bool:
        """Whether a judge was asked, who may give no verdict."""
        return self.judge.startswith(JUDGE)


def win_rates(models: dict[str, dict[str, float]]) -> list[str]:
    """The keys of win rates with an interval; a baseline's name may contain slashes."""
    keys = dict.fromkeys(key for each in models.values() for key in each if "win_rate_vs_" in key)
    rates = [key for key in keys if not key.endswith(f"/{_CONTROLLED}") and _has_interval(models, key)]
    return [key for key in rates if not any(key.startswith(f"{other}/") for other in rates)]


def _has_interval(models: dict[str, dict[str, float]], key: str) -> bool:
    return any(f"{key}/low" in each for each in models.values())


def contests(models: dict[str, dict[str, float]]) -> list[Contest]:
    """All contests, one per judge and baseline."""
    found = []
    for key in win_rates(models):
        judge, _, baseline = key.partition("win_rate_vs_")
        judge = _JUDGES.get(judge, judge.removesuffix("_"))
        wins = {
            name: {
                "rate": 100 * each[key],
                "missing": each.get(f"{key}/missing", 0),
                "asked": each.get(f"{key}/asked", 0),
            }
            | {part.replace("/", "_"): 100 * each[f"{key}/{part}"] for part in _PARTS if f"{key}/{part}" in each}
            for name, each in models.items()
            if f"{key}/low" in each and name != baseline
        }
        if wins:
            found.append(Contest(judge, baseline, wins))
    return found


def gains(summary: dict) -> list[tuple[str, str]]:
    """What each model gains over the one before it, by the grade (or the reward): both models, and a sentence."""
    metric = summary["grader"] or "reward"
    return [
        (f"{each['model']} against {each['over']}", f"{metric} is {gained(each)}")
        for each in summary["gains"]
        if each["metric"] == metric
    ]


@dataclass
class Selection:
    """Candidates that one stage was trained as, and the one that was chosen."""

    name: str
    why: str
    columns: list[str]
    rows: list[list[str]]
    """One for each candidate."""
    chosen: int
    """Number of the chosen row."""


def selections(summary: dict) -> list[Selection]:
    """The selections of a run, each with its table: what a candidate overrides, its win rate, cost, and measures."""
    found = []
    for name, choice in summary["selections"].items():
        candidates = choice["candidates"]
        known = [*_COLUMNS, *(key for key in candidates[0] if key not in _OF_CANDIDATE and key not in _COLUMNS)]
        measured = [key for key in known if key in candidates[0]]
        rows = []
        for i, each in enumerate(candidates):
            interval = f"{each['low']:.1%} to {each['high']:.1%}" if i else "the baseline"
            cells = [in_words(each["overrides"]), f"{each['win_rate']:.1%}", interval]
            cells += [f"{each['relative_work']:.2f}", f"{each['seconds']:.0f}"]
            rows.append([*cells, *(_MEASURES.get(key, ("", "{:.2f}"))[1].format(each[key]) for key in measured)])
        titles = [_MEASURES.get(key, (key.replace("_", " "), ""))[0] for key in measured]
        columns = ["candidate", f"wins, by {choice['by']}", "95 % interval", "relative cost", "seconds", *titles]
        chosen = [each["name"] for each in candidates].index(choice["chosen"])
        found.append(Selection(name, choice["why"], columns, rows, chosen))
    return found


def known_sets(summary: dict) -> list[tuple[str, str]]:
    """How often the reward model is right on known sets: a subset, and its share with the interval and the rows."""
    measured: dict[str, float] = summary["reward_model"]
    names = [key for key in measured if key.rpartition("/")[0] not in measured]  # a subset may be called low, too
    found = []
    for key in sorted(names, key=lambda key: not key.endswith("/score")):
        benchmark, _, subset = key.partition("/")
        title = {"reward_bench": "RewardBench", "reward_bench_2": "RewardBench 2"}.get(benchmark, benchmark)
        words = f"{measured[key]:.1%}"
        if f"{key}/low" in measured:
            words += f", {measured[f'{key}/low']:.1%} to {measured[f'{key}/high']:.1%}"
        if f"{key}/rows" in measured:
            words += f", of {measured[f'{key}/rows']:.0f}"
        found.append((title if subset == "score" else f"{title}, {subset}", words))
    return found


def gained(difference: dict[str, float]) -> str:
    """What a paired difference says, from its 95% interval: `higher by 0.04 to 0.09`, `not seen to differ (...)`."""
    low, high = difference["low"], difference["high"]
    if low <= 0 <= high:
        return f"not seen to differ ({low:+.3f} to {high:+.3f})"
    least, most = sorted((abs(low), abs(high)))
    return f"{'higher' if low > 0 else 'lower'} by {least:.3f} to {most:.3f}"


def facts(summary: dict) -> list[tuple[str, str]]:
    """The run in a few numbers, each with a phrase: the last model, compared with baselines and the first model."""
    models, grader = list(summary["models"]), summary["grader"]
    if not models:
        return []
    released, facts = models[-1], []
    first, last = summary["models"][models[0]], summary["models"][released]
    for contest in contests(summary["models"]):
        if contest.judge in (REWARD, JUDGE) and released in contest.wins:
            words = f"of the answers of {released} beat those of {contest.baseline}, says {contest.judge}"
            facts.append((f"{contest.wins[released]['rate']:.0f}%", words))
    if grader in last and grader in first:
        facts.append((f"{first[grader]:.2f} → {last[grader]:.2f}", f"{grader} from {models[0]} to {released}"))
    facts.append((f"{last['kl_to_init']:.2f}", "nats per answer from where RLHF started"))
    facts.append((f"{last['stop_rate']:.0%}", "of its answers end by themselves"))
    return facts
