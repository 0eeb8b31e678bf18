"""What a stage that measures models holds in memory, in bytes; see `models/cost.py`."""

from gemma2_post.evaluation.keys import JudgeArguments, JudgeModelArguments, MeasureArguments
from gemma2_post.models import cost
from gemma2_post.models.cost import BF16, FP32, Compute
from gemma2_post.stage.command import Checked, Parts

JUDGE_BATCH, JUDGE_QUESTION = 8, 200
"""Pairs that a judge reads at once, and the tokens of its question without them (`evaluation/judging/judge.py`)."""


def compute_of(checked: Checked) -> Compute:
    """The measured models' compute type, attention and device."""
    on_cpu = checked.launcher.use_cpu
    return Compute(FP32 if on_cpu else BF16, "eager", on_cpu)


def measuring(checked: Checked, measured: MeasureArguments) -> dict[str, Parts]:
    """The phases: one model at a time next to the start, then the reward model alone."""
    config, compute, answers = checked.models["init"], compute_of(checked), measured.answers
    assert config is not None, "the planner asks only about models whose shapes it knows"
    answer = answers.max_completion_length
    prompt = cost.longest_prompt(checked.models.values(), answers.max_prompt_length, answer)
    share = cost.weights(config, compute.itemsize) / (1 if compute.on_cpu else checked.num_gpus)
    two = {"weights": share, "start": share}
    by_vllm = {"KV cache": cost.kv_cache(config, 1, prompt + answer, compute.itemsize)}  # more is better, not needed
    sampled = cost.sampling(config, answers.batch_size, prompt, answer, compute)
    found = {
        "sampling": two | (by_vllm if answers.engine == "vllm" else sampled),
        "divergence": two
        | {
            "activations": cost.forward(config, answers.batch_size, prompt + answer, compute),
            "logits": cost.divergence(config, answers.batch_size, answer, compute.itemsize),
        },
    }
    if scorer := checked.models.get("reward_model"):
        quantization = measured.rewards.reward_model_load_in
        found["rewards"] = {
            "reward model": cost.weights(scorer, compute.itemsize, quantization),
            "activations": cost.forward(scorer, measured.rewards.reward_batch_size, prompt + answer, compute)
            + cost.dequantized(scorer, quantization),
        }
    return found


def judging(checked: Checked, measured: MeasureArguments, args: JudgeArguments) -> dict[str, Parts]:
    """The phase of a local judge; nothing without one."""
    answers = measured.answers
    prompt = cost.longest_prompt(checked.models.values(), answers.max_prompt_length, answers.max_completion_length)
    return judge_of(checked, args, prompt + 2 * answers.max_completion_length)


def judge_of(checked: Checked, args: JudgeModelArguments, length: int) -> dict[str, Parts]:
    """The phase of a local judge; nothing without one.

    Args:
        length: Tokens of the longest prompt with the answers to it that the judge reads at once.
    """
    judge, compute = checked.models.get("judge"), compute_of(checked)
    if judge is None:
        return {}
    size = cost.weights(judge, compute.itemsize, args.judge_load_in)
    held = {"judge": size + cost.dequantized(judge, args.judge_load_in)}
    question = JUDGE_QUESTION + length
    if args.judge_engine == "vllm":
        return {
            "judge": held | {"KV cache": cost.kv_cache(judge, 1, question + args.judge_max_tokens, compute.itemsize)}
        }
    return {"judge": held | cost.sampling(judge, JUDGE_BATCH, question, args.judge_max_tokens, compute)}
