"""Recipe keys for how answers are sampled, rewarded, graded and measured."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from gemma2_post.data.keys import DataArguments, Source
from gemma2_post.stage.bounds import COUNT, FILLED, NOT_NEGATIVE, POSITIVE, SEED
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.paths import FilePath, FunctionPath, ModelPath, OtherModelPath
from gemma2_post.stage.recipe import Effect, key, part

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Quantization = Literal["4bit", "8bit"]
"""How a frozen model is quantized: NF4, or LLM.int8."""
MEASURES = {"kl_to_init", "reward", "stop_rate", "mean_tokens"}
"""What is measured for each model in addition to its grades."""


REFUSED = {
    "held_out_datasets": "nothing is trained here, so all prompts are in datasets; name the prompts there",
    "held_out_share": "nothing is trained here, so all prompts of datasets are read; remove it",
}
"""Keys of data and samples that do nothing where models are only measured, with the reason."""


def _refuse_idle(args: "DataclassInstance", needed: str, names: list[str]) -> None:
    """Refuses keys that are set although what they act on is missing: the key `needed`."""
    for each in fields(args):
        if each.name in names and getattr(args, each.name) != each.default:
            raise UserError(f"{each.name} does nothing without {needed}; set {needed}, or remove {each.name}")


@dataclass
class SampleArguments:
    """The held-out answers that are sampled and graded."""

    graders: list[FunctionPath] | None = key(
        None,
        "Functions module:function that grade sampled answers, called as TRL calls reward functions.",
        effect=Effect.MEASUREMENTS,
    )
    headline: str | None = key(
        None, "The metric shown first in tables and reports; without it, the first grader.", effect=Effect.NONE
    )
    group_by: str | None = key(None, "Column by which the grades are also broken down.", effect=Effect.MEASUREMENTS)
    num_samples: int = key(
        64, "Held-out prompts answered before and after; 0 for none.", effect=Effect.MEASUREMENTS, bounds=NOT_NEGATIVE
    )

    @property
    def grader_names(self) -> list[str]:
        """The names of the graders' metrics."""
        return [path.rpartition(":")[2] for path in self.graders or []]

    @property
    def headline_grader(self) -> str | None:
        """The metric that the recipe calls its headline, or its first grader."""
        return self.headline or next(iter(self.grader_names), None)

    @property
    def metrics(self) -> set[str]:
        """The names of the metrics of the answers."""
        return {"stop_rate", "mean_tokens", *self.grader_names} if self.num_samples else set()


@dataclass
class RewardFunctionArguments:
    """How answers are rewarded."""

    reward_model: ModelPath | None = key(None, "Finished output of the reward stage.")
    reward_model_load_in: Quantization | None = key(
        None, "Quantizes the reward model, which is only read, to NF4 or LLM.int8."
    )
    normalize_rewards: bool = key(
        True, "Normalizes the reward model's scores with the mean and spread that its training recorded."
    )
    reward_batch_size: int = key(32, "Conversations that the reward model reads at once.", bounds=COUNT)
    missing_end_penalty: float = key(
        1.0,
        "Subtracted from the reward of an answer that was cut at the length limit; 0 for none.",
        bounds=NOT_NEGATIVE,
    )
    length_penalty: float = key(0.0, "Subtracted from the reward for each token of an answer.", bounds=NOT_NEGATIVE)
    reward_functions: list[FunctionPath] | None = key(
        None, "Functions module:function, called as TRL calls them; their values are added."
    )

    def check(self) -> None:
        """Refuses keys that would reward nothing."""
        if not self.reward_model and not self.reward_functions:
            raise UserError("nothing rewards the answers; name a reward_model, or reward_functions")
        if not self.reward_model:
            _refuse_idle(self, "reward_model", ["reward_model_load_in", "normalize_rewards", "reward_batch_size"])

    @property
    def names(self) -> set[str]:
        """The names of the reward functions, as TRL and metrics call them."""
        found = {path.rpartition(":")[2] for path in self.reward_functions or []}
        others = ("reward_model", "missing_end_penalty", "length_penalty")
        return found | {name for name in others if getattr(self, name)}


@dataclass
class WatchArguments:
    """How a policy is watched while RLHF trains it."""

    watch_steps: int = key(
        20,
        "Steps between measurements on held-out prompts; each one under the budget writes a checkpoint.",
        bounds=COUNT,
    )
    kl_budget: float | None = key(
        None,
        "Largest KL to the start, in nats per answer; past it, the run ends at its last checkpoint under it.",
        bounds=POSITIVE,
    )


@dataclass
class EngineArguments:
    """What samples answers."""

    engine: Literal["transformers", "vllm"] = key(
        "transformers", "What samples the answers; vllm starts a server for each model and stops it again."
    )
    vllm_program: str = key(
        "vllm", "vLLM's program; a path if it has an environment of its own.", effect=Effect.NONE, bounds=FILLED
    )

    def check(self) -> None:
        """Refuses a key that would do nothing."""
        if self.engine != "vllm":
            _refuse_idle(self, "engine: vllm", ["vllm_program"])


@dataclass
class AnswerArguments(EngineArguments):
    """How models answer held-out prompts side by side."""

    max_completion_length: int = key(512, "Longest answer, in tokens.", bounds=COUNT)
    max_prompt_length: int | None = key(
        None, "Longer prompts are dropped; None for what the answer leaves of the model's positions.", bounds=COUNT
    )
    batch_size: int = key(32, "Prompts answered at once.", bounds=COUNT)
    seed: int = key(0, "Seed of the sampling and of the mixture of data sets.", bounds=SEED)
    answer_processes: int = key(
        1,
        "Models that answer side by side, each in a process with its share of the GPUs.",
        effect=Effect.NONE,
        bounds=COUNT,
    )


@dataclass(kw_only=True)
class MeasureArguments:
    """How models that answer the same held-out prompts are rewarded and graded."""

    answers: AnswerArguments = part(AnswerArguments)
    data: DataArguments = part(DataArguments)
    samples: SampleArguments = part(SampleArguments)
    rewards: RewardFunctionArguments = part(RewardFunctionArguments)

    def check(self, is_rewarded: bool = True) -> None:
        """Refuses what cannot be measured.

        Args:
            is_rewarded: Whether the answers must have a reward.
        """
        if self.samples.num_samples < 2:
            raise UserError(f"num_samples is {self.samples.num_samples}; write 2 or more")
        for name in self.samples.grader_names:
            if name in MEASURES | {"judge", "win_rate", "reward_win_rate", "disagreement"}:
                raise UserError(f"graders: {name} is the name of another measure; call the function something else")
        self.answers.check()
        if is_rewarded:
            self.rewards.check()

    @property
    def metrics(self) -> set[str]:
        """The names of the metrics of each model."""
        return {*MEASURES, *self.samples.grader_names}


@dataclass
class EndpointArguments:
    """How an OpenAI-compatible endpoint is asked."""

    api_key_variable: str | None = key(
        None, "Environment variable with the endpoint's key; None if it needs none.", effect=Effect.NONE
    )
    concurrency: int = key(8, "Requests to the endpoint at a time.", effect=Effect.NONE, bounds=COUNT)
    endpoint_timeout: float = key(120.0, "Seconds for one attempt.", effect=Effect.NONE, bounds=POSITIVE)


@dataclass(kw_only=True)
class JudgeModelArguments:
    """The model that judges."""

    judge: ModelPath | None = key(None, "A model that judges answers: a folder, or its name at judge_endpoint.")
    judge_load_in: Quantization | None = key(None, "Quantizes a judge in a folder to NF4 or LLM.int8.")
    judge_engine: Literal["transformers", "vllm"] = key("transformers", "What runs a judge in a folder.")
    judge_vllm_program: str = key("vllm", "vLLM's program, for judge_engine vllm.", effect=Effect.NONE, bounds=FILLED)
    judge_endpoint: str | None = key(None, "Base URL of the judge's OpenAI-compatible server.")
    judge_max_tokens: int = key(4096, "Longest reply of the judge, in tokens, its thoughts included.", bounds=COUNT)

    def check_judge(self) -> None:
        """Refuses a judge that cannot be asked."""
        if self.judge_endpoint and not self.judge:
            raise UserError("judge_endpoint has no judge; name the model there that is to judge")
        if self.judge_endpoint and self.judge_load_in:
            raise UserError(
                "judge_load_in is for a judge in a folder; remove it, the server at judge_endpoint decides"
            )
        if self.judge_engine == "vllm" and (self.judge_load_in or self.judge_endpoint):
            raise UserError(
                "judge_engine is vllm, which judge_load_in and judge_endpoint cannot go with; remove one of them"
            )
        if self.judge_engine != "vllm":
            _refuse_idle(self, "judge_engine: vllm", ["judge_vllm_program"])
        if not self.judge:
            _refuse_idle(self, "judge", ["judge_load_in", "judge_max_tokens", "judge_engine"])


@dataclass(kw_only=True)
class JudgeArguments(JudgeModelArguments):
    """Who judges answers."""

    endpoint: EndpointArguments = part(EndpointArguments)
    safety_datasets: list[Source] | None = key(None, "Prompts whose answers the judge checks for safety violations.")

    def check(self) -> None:
        """Refuses a judge that cannot be asked, and keys that would do nothing."""
        if self.safety_datasets and not self.judge:
            raise UserError("safety_datasets has answers to judge, and there is no judge; name one")
        self.check_judge()
        if not self.judge_endpoint:
            _refuse_idle(self.endpoint, "judge_endpoint", ["api_key_variable", "concurrency", "endpoint_timeout"])


@dataclass(kw_only=True)
class ReleaseArguments:
    """How the points of a merge are measured and one of them is released."""

    measured: MeasureArguments = part(MeasureArguments)
    runs: list[ModelPath] | None = key(None, "Finished policies whose checkpoints and anchors are measured, too.")
    kl_budget: float | None = key(
        None,
        "Largest KL of the released point to the start, in nats per answer; None for no limit.",
        bounds=NOT_NEGATIVE,
    )
    release_by: str = key(
        "reward",
        "What chooses the released point: the highest reward, or the win rate against the start by judge, or by the "
        "grader that is named.",
    )
    judging: JudgeArguments = part(JudgeArguments)

    def check(self, etas: list[float]) -> None:
        """Refuses a release that cannot be decided.

        Args:
            etas: The points of the sweep.
        """
        self.measured.check()
        self.judging.check()
        known = ["reward", "judge", *self.measured.samples.grader_names]
        if self.release_by not in known:
            raise UserError(
                f"release_by is {self.release_by}; write {', '.join(known[:-1])} or {known[-1]}, or name it in graders"
            )
        if self.release_by == "judge" and not self.judging.judge:
            raise UserError("release_by is judge, and there is none; name a judge")
        if self.release_by != "judge" and self.judging.judge:
            raise UserError(
                f"judge does nothing with release_by: {self.release_by}; write release_by: judge, or remove it"
            )
        if 0 in etas:
            return
        if self.kl_budget is not None:
            raise UserError("with a kl_budget, eta needs 0, which is always within it; add it")
        if self.release_by != "reward":
            raise UserError(f"release_by {self.release_by} counts wins against the start, and eta lacks it; add 0")


@dataclass
class OtherModel:
    """A model that is not of this chain, and of any family."""

    name: str = key(help="What it is called in tables.")
    model: OtherModelPath = key(help="A folder, a name on the Hub, or the name at the endpoint.")
    endpoint: str | None = key(None, "Base URL of an OpenAI-compatible server; without it, the model runs here.")
    api_key_variable: str | None = key(
        None, "Environment variable with the endpoint's key; None if it needs none.", effect=Effect.NONE
    )


@dataclass
class OtherArguments:
    """Models that are not of this chain, beside it."""

    others: list[OtherModel] | None = key(
        None, "Other models that answer, too: name, model, endpoint, api_key_variable."
    )
    other_concurrency: int = key(8, "Requests to an endpoint of others at a time.", effect=Effect.NONE, bounds=COUNT)

    def check(self) -> None:
        """Refuses keys that would do nothing."""
        if not self.others:
            _refuse_idle(self, "others", ["other_concurrency"])
        for each in self.others or []:
            if each.api_key_variable and not each.endpoint:
                raise UserError(
                    f"others: {each.name} has an api_key_variable and no endpoint; add it, or remove the key"
                )


@dataclass
class ProtocolArguments:
    """Published protocols, whose questions all models answer and the judge judges."""

    mt_bench: FilePath | None = key(
        None, "Folder with FastChat's question.jsonl, reference_answer, and maybe judge_prompts.jsonl."
    )
    arena_hard: FilePath | None = key(
        None, "Folder with Arena-Hard-Auto's question.jsonl, model_answer, and maybe judge_config.yaml."
    )
    arena_hard_baseline: str | None = key(
        None, "File in its model_answer to compare with, without .jsonl; without it, the only one, or the project's."
    )
    alpaca_eval: FilePath | None = key(
        None, "File of outputs to compare with, as AlpacaEval's: instruction, output, generator."
    )
    outputs: list[FilePath] | None = key(
        None,
        "Files of other models' answers, as AlpacaEval's model_outputs.json, or in the layout of a protocol; each is "
        "compared on all questions that it answers.",
    )

    def check(self, judge: str | None) -> None:
        """Refuses protocols that cannot be judged."""
        for name in ("mt_bench", "arena_hard", "alpaca_eval"):
            if getattr(self, name) and not judge:
                raise UserError(f"{name} has answers to judge, and there is no judge; name one")
        if not self.arena_hard:
            _refuse_idle(self, "arena_hard", ["arena_hard_baseline"])

    @property
    def metrics(self) -> set[str]:
        """The names of the metrics of each model."""
        found = {"mt_bench", "mt_bench_win_rate"} if self.mt_bench else set()
        found |= {"arena_hard_win_rate"} if self.arena_hard else set()
        return found | ({"alpaca_eval_win_rate"} if self.alpaca_eval else set())


@dataclass
class CorpusArguments:
    """The corpus that models may have memorized."""

    corpus: list[Source] | None = key(
        None, "Texts or conversations, to measure how much of them each model has memorized."
    )
    num_memorised: int = key(1000, "Number of places in the corpus to test.", bounds=COUNT)

    def check(self) -> None:
        """Refuses keys that would do nothing."""
        if not self.corpus:
            _refuse_idle(self, "corpus", ["num_memorised"])


@dataclass
class BenchmarkArguments:
    """Academic benchmarks by lm-eval."""

    benchmarks: list[str] | None = key(
        None, "Tasks of lm-eval; [preset] for MMLU, GSM8K, ARC-c, HellaSwag, Winogrande."
    )
    benchmark_folder: FilePath | None = key(None, "Folder with more tasks as lm-eval's YAML.")
    benchmark_limit: int | None = key(None, "Examples of each task; None for all.", bounds=COUNT)
    benchmark_batch_size: int = key(
        1, "Questions at once, each with its examples and logits for all tokens.", bounds=COUNT
    )

    def check(self) -> None:
        """Refuses keys that would do nothing."""
        if not self.benchmarks:
            _refuse_idle(self, "benchmarks", ["benchmark_folder", "benchmark_limit", "benchmark_batch_size"])


@dataclass(kw_only=True)
class SynthesisArguments(EngineArguments, JudgeModelArguments):
    """How a teacher writes answers."""

    seed: int = key(0, "Seed of the sampling and of the mixture.", bounds=SEED)
    num_answers: int = key(1, "Answers sampled for each prompt.", bounds=COUNT)
    temperature: float = key(
        1.0, "Sampling temperature, without top-p (top-k: the endpoint's own); 0 is greedy.", bounds=NOT_NEGATIVE
    )
    max_new_tokens: int = key(512, "Longest answer; answers that reach it are dropped.", bounds=COUNT)
    reward_model: ModelPath | FunctionPath | None = key(
        None, "Keeps the best answer to each prompt: a reward model's folder, or module:function."
    )
    pairs: bool = key(
        False, "Also write pairs/: the best answer to each prompt against the worst, by reward_model or judge."
    )
    batch_size: int = key(16, "Prompts that a local model answers at once.", bounds=COUNT)
    answer_processes: int = key(
        1,
        "Processes in which a local model answers, each with a copy of it and its share of the GPUs.",
        effect=Effect.NONE,
        bounds=COUNT,
    )
    max_prompt_length: int | None = key(
        None, "Longer prompts are dropped; None for what a local model's positions allow.", bounds=COUNT
    )
    endpoint: str | None = key(None, "Base URL of an OpenAI-compatible server for model_name_or_path.")
    server: EndpointArguments = part(EndpointArguments)
    endpoint_retries: int = key(
        20,
        "Additional attempts, at most 8 s apart: 20 are about two and a half minutes.",
        effect=Effect.NONE,
        bounds=NOT_NEGATIVE,
    )

    def check_scores(self) -> None:
        """Refuses scores of answers that cannot be made, or that nothing needs."""
        self.check_judge()
        if not self.endpoint:
            _refuse_idle(self, "endpoint", ["endpoint_retries"])
            if not self.judge_endpoint:
                names = [each.name for each in fields(self.server)]
                _refuse_idle(self.server, "endpoint or judge_endpoint", names)
        if self.judge and self.reward_model:
            raise UserError("judge and reward_model both say which answer is best; remove one of them")
        if self.pairs and not (self.judge or self.reward_model):
            raise UserError("pairs needs to know which answer is better; name a reward_model or a judge")
        scorer = "reward_model" if self.reward_model else "judge"
        if (self.judge or self.reward_model) and self.num_answers == 1:
            raise UserError(f"{scorer} picks the best of num_answers, which is 1; raise num_answers")

    @property
    def judging(self) -> JudgeArguments:
        """The judge, at an endpoint that is asked as the teacher's is."""
        of_judge = {each.name: getattr(self, each.name) for each in fields(JudgeModelArguments)}
        return JudgeArguments(**of_judge, endpoint=self.server)
