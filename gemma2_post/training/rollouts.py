"""Rollouts by vLLM in TRL's trainers: what they must be told for Gemma 2, and whether both compute the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from gemma2_post.evaluation.answering.samples import Answer, evaluating
from gemma2_post.evaluation.divergence import answer_logits
from gemma2_post.models.tokens import STOP_TOKEN_IDS
from gemma2_post.stage.errors import UserError
from gemma2_post.training.checks import check_vllm

if TYPE_CHECKING:
    from trl import DistillationConfig, DistillationTrainer, RLOOConfig, RLOOTrainer

TOLERANCE = 0.1
"""Largest mean difference of the log-probabilities of vLLM and the trained policy, in nats per token."""
DIFFERENCE = "sampling/sampling_logp_difference"
"""TRL's name for that difference, in the trainers that log it themselves; its mean and its maximum."""


def prepare(training: "RLOOConfig | DistillationConfig", longest_prompt: int, is_made: bool) -> None:
    """Tells vLLM how long conversations get, and both of Gemma 2's stop tokens.

    Args:
        longest_prompt: In tokens.
        is_made: Whether a finished model is only measured, for which transformers samples.

    Raises:
        UserError: vLLM is not installed.
    """
    training.use_vllm = training.use_vllm and not is_made
    if not training.use_vllm:
        return
    check_vllm()
    if training.vllm_max_model_length is None:
        training.vllm_max_model_length = longest_prompt + training.max_completion_length
    training.generation_kwargs = {"stop_token_ids": STOP_TOKEN_IDS} | (training.generation_kwargs or {})


def compare(trainer: "RLOOTrainer | DistillationTrainer") -> None:
    """Lets the trainer log, at each step, how far vLLM's log-probabilities are from the policy's on what vLLM sampled.

    Each process compares the first `per_device_eval_batch_size` of its answers, in nats per token. The trainer's own
    update takes the answers as the policy's: REINFORCE and distillation have no correction for another sampler in TRL.

    Raises:
        UserError: Later, at a step at which the mean difference is larger than `TOLERANCE`.
    """
    if not trainer.use_vllm:
        return
    rollouts, rows = trainer.vllm_generation, trainer.args.per_device_eval_batch_size
    sample, synchronize = rollouts.generate, rollouts.sync_weights

    def generate(prompts: list[list[int]], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        found = sample(prompts, *args, **kwargs)
        answers = [Answer("", *ids) for ids in zip(prompts[:rows], found[1][:rows], strict=True)]
        theirs = torch.tensor([position[0] for row in found[2][:rows] for position in row])
        _log(trainer, (_log_probabilities(trainer, answers).cpu() - theirs).abs())
        return found

    def sync_weights() -> None:
        with exact_base(rollouts.model):
            synchronize()

    rollouts.logprobs = 0  # also asks for that of each sampled token
    rollouts.generate, rollouts.sync_weights = generate, sync_weights


@contextmanager
def exact_base(model: torch.nn.Module) -> Iterator[None]:
    """Keeps the weights that an adapter is added to and subtracted from, which rounds bf16 weights each time.

    TRL does this at each step to tell vLLM the sum. Under ZeRO-3 nothing is kept, because the gathered weights that
    are summed are thrown away.
    """
    weights = [each.get_base_layer().weight for each in model.modules() if isinstance(each, BaseTunerLayer)]
    kept = [weight.data.clone() for weight in weights]
    yield
    for weight, data in zip(weights, kept, strict=True):
        weight.data.copy_(data)


def _log_probabilities(trainer: "RLOOTrainer | DistillationTrainer", answers: list[Answer]) -> torch.Tensor:
    """The policy's log-probability of each token, (tokens of all answers), at the temperature of sampling."""
    longest = max(len(answer.token_ids) for answer in answers)
    with evaluating(trainer.model_wrapped), torch.no_grad():
        logits = answer_logits(trainer.model_wrapped, trainer.accelerator, answers, longest)
    found = []
    for row, answer in zip(logits, answers, strict=True):
        targets = torch.tensor(answer.token_ids, device=row.device)
        own = row[-len(targets) - 1 : -1] / trainer.args.temperature
        # With 256k tokens, an fp32 copy of the logits of 128 positions takes 0.13 GB.
        for part, wanted in zip(own.split(128), targets.split(128), strict=True):
            found.append(-torch.nn.functional.cross_entropy(part.float(), wanted, reduction="none"))
    return torch.cat(found)


def _log(trainer: "RLOOTrainer | DistillationTrainer", differences: torch.Tensor) -> None:
    device, mode = trainer.accelerator.device, "train" if trainer.model.training else "eval"
    total = torch.stack([differences.sum(), torch.tensor(float(len(differences)))]).to(device)
    total = trainer.accelerator.reduce(total, reduction="sum")
    mean, largest = (total[0] / total[1]).item(), trainer.accelerator.gather(differences.max().to(device)).max().item()
    trainer._metrics[mode][f"{DIFFERENCE}/mean"].append(mean)
    trainer._metrics[mode][f"{DIFFERENCE}/max"].append(largest)
    if not mean <= TOLERANCE:
        raise UserError(
            f"vLLM's log-probabilities of what it sampled differ from the policy's by {mean:.3g} nats per token, more "
            f"than {TOLERANCE}, so it samples from another model; use another version of vLLM, or remove use_vllm"
        )


def version(trainer: "RLOOTrainer | DistillationTrainer") -> str:
    """vLLM's version, here or of the server; the main process asks."""
    if trainer.vllm_mode == "server":
        client = trainer.vllm_generation.vllm_client
        return str(client._get(f"{client.base_url}/version")["version"])
    return metadata.version("vllm")
