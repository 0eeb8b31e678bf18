"""What an evaluation reads before models answer: judge, protocols, other models' answers, prompts, and a corpus."""

import logging
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gemma2_post.data.keys import DataArguments, Source
from gemma2_post.data.mixture import load_documents, load_rows
from gemma2_post.data.preparation import drop_ties, drop_too_long
from gemma2_post.data.ranked import RANKED
from gemma2_post.data.rows import PROMPT
from gemma2_post.data.turns import Message
from gemma2_post.evaluation.answering import endpoint
from gemma2_post.evaluation.answering.vllm_server import Server, check_program, serving
from gemma2_post.evaluation.comparison import Protocol
from gemma2_post.evaluation.judging.judge import Judge, ask_endpoint, ask_model, ask_vllm
from gemma2_post.evaluation.keys import CorpusArguments, JudgeArguments, ProtocolArguments
from gemma2_post.evaluation.measure import Measurement, load
from gemma2_post.evaluation.memorisation import CONTINUATION, PREFIX, windows
from gemma2_post.evaluation.protocols import alpaca_eval, arena_hard, mt_bench
from gemma2_post.evaluation.protocols.outputs import Outputs, complete, key_of, read_outputs
from gemma2_post.models.loading import load_config
from gemma2_post.models.tokenizer import load_tokenizer, render
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError

logger = logging.getLogger(__name__)


def load_judge(args: JudgeArguments, replies: Path) -> Judge | None:
    """The judge that the recipe names; an endpoint is checked once.

    Args:
        replies: File for the judge's replies; outside the output, which a changed recipe makes again.
    """
    if not args.judge:
        return None
    if args.judge_endpoint:
        client = endpoint.connect(args.judge_endpoint, args.endpoint, retries=endpoint.JUDGE_RETRIES)
        endpoint.check(client)
        server = endpoint.Endpoint(client, args.judge, has_answered=replies.is_file())
        ask = ask_endpoint(server, args.judge_max_tokens, args.endpoint.concurrency)
        return Judge(ask, f"{args.judge_endpoint} {args.judge}", args.judge_max_tokens, replies)
    tokenizer = load_tokenizer(args.judge, load_config(args.judge))
    digest = contract.input_digest(args.judge) or args.judge
    # Loaded when it is first asked: by then the models that it judges have answered.
    if args.judge_engine == "vllm":
        return _judge_by_vllm(args, f"{digest} vllm", tokenizer, replies)
    loaded = cache(partial(load, Path(args.judge), quantization=args.judge_load_in))
    name = f"{digest} {args.judge_load_in}" if args.judge_load_in else digest
    ask = ask_model(loaded, tokenizer, args.judge_max_tokens)
    return Judge(ask, name, args.judge_max_tokens, replies, close=loaded.cache_clear)


def _judge_by_vllm(args: JudgeArguments, name: str, tokenizer: PreTrainedTokenizerBase, replies: Path) -> Judge:
    assert args.judge, "its name is known"
    check_program(args.judge_vllm_program, "judge_")
    config, stack = load_config(args.judge), ExitStack()
    positions, log = config.max_position_embeddings, replies.with_name("judge-vllm.log")
    server = Server(args.judge_vllm_program, args.judge, log, positions, config.num_key_value_heads)
    serve = partial(serving, server, tokenizer, partial(load, Path(args.judge)), args.judge_max_tokens, 0)
    served = cache(lambda: stack.enter_context(serve()))
    ask = ask_vllm(served, tokenizer, positions, args.judge_max_tokens)
    return Judge(ask, name, args.judge_max_tokens, replies, close=stack.close)


def read_protocols(args: ProtocolArguments, baseline: str) -> list[Protocol]:
    """The protocols that the recipe names."""
    found: list[Protocol] = []
    if args.mt_bench:
        found.append(mt_bench.load(args.mt_bench, baseline))
    if args.arena_hard:
        found.append(arena_hard.load(args.arena_hard, args.arena_hard_baseline))
    if args.alpaca_eval:
        found.append(alpaca_eval.load(args.alpaca_eval))
    return found


def load_protocols(args: ProtocolArguments, baseline: str, measurement: Measurement) -> list[Protocol]:
    """The protocols that the recipe names; a question that models cannot read is an error."""
    found = read_protocols(args, baseline)
    for each in found:
        asked = each.questions
        measurement.check_conversations(asked.prompts, asked.later, f"question {{}} of {asked.protocol}")
    return found


def load_outputs(
    args: ProtocolArguments, names: list[str], protocols: list[Protocol], measurement: Measurement
) -> list[Outputs]:
    """The answers of other models.

    Args:
        names: The names of the compared models.

    Raises:
        UserError: A file cannot be read, has the name of another, or does not answer all questions of a kind.
    """
    found = [read_outputs(file) for file in args.outputs or []]
    keys = [key_of(prompt) for prompt in measurement.rows["prompt"]]
    for i, each in enumerate(found):
        if each.name in [*names, *(other.name for other in found[:i])]:
            raise UserError(f"outputs: two models are called {each.name}; change the generator in one of the files")
        sets = {"datasets": each.answers_to(keys)}
        sets |= {one.questions.protocol: one.questions.answers_of(each) for one in protocols}
        counts = {
            what: f"{len(answers) - answers.count(None)} of {len(answers)} questions of {what}"
            for what, answers in sets.items()
        }
        partly = [counts[what] for what, answers in sets.items() if not complete(answers) and any(answers)]
        if not any(map(complete, sets.values())):
            answered = ", ".join(partly) or f"no question of {', '.join(sets)}"
            raise UserError(f"outputs of {each.name} answer {answered}; give answers to all questions of one of them")
        if complete(sets["datasets"]) and any(measurement.later):
            raise UserError(
                f"outputs of {each.name} hold one answer to each prompt, and datasets has questions of several turns; "
                "leave out one of the two"
            )
        if partly:
            logger.warning("outputs of %s answer %s, and are left out there", each.name, ", ".join(partly))
    return found


def load_safety_prompts(args: JudgeArguments, measurement: Measurement) -> list[list[Message]]:
    """The prompts of `safety_datasets`; a prompt that is too long is an error."""
    if not args.safety_datasets:
        return []
    seed, tokenizer = measurement.args.seed, measurement.tokenizer
    found = load_rows(args.safety_datasets, 0.0, seed, row_format=PROMPT, tokenizer=tokenizer)
    rows = drop_too_long(found, "max_prompt_length", measurement.longest, max_too_long_share=0.0).dataset()
    return list(rows["prompt"])


def load_known_sets(sources: list[Source] | None, measurement: Measurement, args: DataArguments) -> list[Dataset]:
    """The rows of benchmarks of reward models, without ties and those that are too long for the reward model."""
    found = []
    for source in sources or []:
        assert measurement.score is not None, "checked"
        rows = load_rows([source], args.max_invalid_share, 0, row_format=RANKED, tokenizer=measurement.tokenizer)
        rows = drop_ties(rows, "reward_benchmarks")
        longest = measurement.score.max_length
        found.append(drop_too_long(rows, "the reward model's max_length", longest, args.max_too_long_share).dataset())
    return found


def load_corpus(
    args: CorpusArguments, tokenizer: PreTrainedTokenizerBase, max_invalid_share: float, seed: int
) -> list[list[int]] | None:
    """The sampled windows of the corpus, as token ids; conversations are in the format in which SFT reads them."""
    if not args.corpus:
        return None
    documents = [
        tokenizer(document, add_special_tokens=False)["input_ids"]
        if isinstance(document, str)
        else render(tokenizer, [document])["input_ids"][0][1:].tolist()  # without <bos>
        for document in load_documents(args.corpus, max_invalid_share, seed)
    ]
    found = windows(documents, args.num_memorised, seed)
    if not found:
        raise UserError(f"corpus has no text of {PREFIX + CONTINUATION} tokens; give longer ones")
    return found
