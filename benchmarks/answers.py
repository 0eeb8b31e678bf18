"""How fast models answer: transformers in one process and in several, and vLLM, side by side.

    python benchmarks/answers.py [--vllm PROGRAM] [--model DIR] [--models 8] [--prompts 240] [--samples 4]

Copies of a model answer the same prompts, as the points of a front do; then vLLM and transformers answer with several
samples each, and greedily, to count equal answers. Prints a table in Markdown.
"""

import argparse
import shutil
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

import torch

from gemma2_post.data.keys import DataArguments, Source
from gemma2_post.data.turns import Message
from gemma2_post.evaluation.answering.endpoint import Completion, Endpoint, RefusedError, Request
from gemma2_post.evaluation.answering.samples import PartlyAnswered, sample_answers
from gemma2_post.evaluation.answering.vllm_server import Server, differences, log_probabilities, serving
from gemma2_post.evaluation.keys import AnswerArguments, MeasureArguments, RewardFunctionArguments, SampleArguments
from gemma2_post.evaluation.measure import Measurement, load
from gemma2_post.models.loading import load_config
from gemma2_post.models.tokenizer import load_tokenizer
from gemma2_post.tiny.data import prompts

LENGTH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="PROGRAM")
    parser.add_argument("--model", type=Path, default=Path("gemma2_post/tiny/models/teacher"))
    parser.add_argument("--models", type=int, default=8, help="copies that answer")
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--samples", type=int, default=4)
    args = parser.parse_args()
    rows = [row["prompt"] for row in prompts("test")[: args.prompts]]
    print("| what | seconds | tokens/s |\n|---|---|---|")
    for num_processes in (1, 2):
        seconds = of_models(args.model, args.models, args.prompts, num_processes)
        print(
            f"| {args.models} models, {num_processes} process{'es' if num_processes > 1 else ''} | {seconds:.1f} | |"
        )
    config = load_config(str(args.model))
    tokenizer, device = load_tokenizer(str(args.model), config), torch.device("cpu")
    many, model = [prompt for prompt in rows for _ in range(args.samples)], load(args.model, device)
    began = time.monotonic()
    sampled = sample_answers(model, tokenizer, many, LENGTH)
    show(f"transformers, {len(many)} answers", sampled, began)
    if args.vllm:
        greedy = sample_answers(model, tokenizer, rows, LENGTH, temperature=0.0)
        log = Path(tempfile.mkdtemp()) / "vllm.log"
        server = Server(args.vllm, str(args.model), log, config.max_position_embeddings, config.num_key_value_heads)
        began = time.monotonic()
        with serving(server, tokenizer, partial(load, args.model, device), LENGTH, seed=0) as sample:
            print(f"| vLLM {server.version()}, start and check | {time.monotonic() - began:.1f} | |")
            found = sample(rows, 0.0, PartlyAnswered())
            began = time.monotonic()
            show(f"vLLM, {len(many)} answers", sample(many, 1.0, PartlyAnswered()), began)
            asked = endpoint_texts(server, rows)
            texts = [each.prompt_ids + each.token_ids for each in greedy]
            apart = differences(server, texts, log_probabilities(model, texts))
        tokens = sum(one.token_ids == other.token_ids for one, other in zip(greedy, found, strict=True))
        same = sum(one.text == text for one, text in zip(greedy, asked, strict=True))
        print(
            f"\nGreedy answers that are transformers': {tokens} of {len(rows)} by vLLM, {same} by it as an endpoint."
        )
        print(f"Log-probabilities differ by {mean(apart):.2g} nats on average, by {max(apart):.2g} at most.")


def endpoint_texts(server: Server, rows: list[list[Message]]) -> list[str]:
    """Greedy answers of the server through its chat completions, with its own chat template."""
    found: dict[int, str] = {}

    def write(number: int, answer: Completion | RefusedError) -> None:
        found[number] = answer.text if isinstance(answer, Completion) else str(answer)

    requests = [Request(f"prompt {i}", prompt, 0.0, LENGTH, seed=0) for i, prompt in enumerate(rows)]
    Endpoint(server.client, server.client.models.list().data[0].id).answer_all(requests, 16, write)
    return [found[number] for number in range(len(rows))]


def of_models(model: Path, num_models: int, num_prompts: int, num_processes: int) -> float:
    """Seconds for copies of a model to answer, their start included."""
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder) / str(number) for number in range(num_models)]
        for copy in copies:
            shutil.copytree(model, copy)
        measured = MeasureArguments(
            answers=AnswerArguments(max_completion_length=LENGTH, answer_processes=num_processes),
            data=DataArguments(datasets=[Source("gemma2_post.tiny.data:prompts", split="test")]),
            samples=SampleArguments(num_samples=num_prompts),
            rewards=RewardFunctionArguments(reward_functions=["gemma2_post.tiny.gold:gold"]),
        )
        measured = replace(measured, data=replace(measured.data, columns=["skill", "answer"]))
        measurement = Measurement(str(model), measured, Path(folder) / "kept")
        began = time.monotonic()
        measurement.answer(copies)
        return time.monotonic() - began


def show(what: str, answers: list, began: float) -> None:
    """A row of the table."""
    seconds, num_tokens = time.monotonic() - began, sum(len(each.token_ids) for each in answers)
    print(f"| {what} | {seconds:.1f} | {num_tokens / seconds:.0f} |")


if __name__ == "__main__":
    main()
