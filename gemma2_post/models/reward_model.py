"""Reward models: made from a language model, sealed when saved, and checked when loaded."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import ModelConfig
from trl.trainer.reward_trainer import suppress_seqcls_warning

from gemma2_post.models.folder import REWARD_MODEL, read_shapes
from gemma2_post.models.loading import frozen_arguments, load_config, load_pretrained, training_device_map
from gemma2_post.models.shapes import SCORE_HEAD
from gemma2_post.models.streaming import places_of, read_tensor
from gemma2_post.models.templates import template_digest
from gemma2_post.models.tokenizer import load_tokenizer, tokenizer_digest
from gemma2_post.models.tokens import PAD
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError

FILE = "reward_model.json"
_CANARY_TOLERANCE = {None: 0.1, "8bit": 0.2, "4bit": 0.5}
"""By quantization, as a share of the rewards' standard deviation: rounding shifts scores by less, another head by far
more. Shifts of the tiny world's reward model, mean and 99%: 0.01 and 0.04 in 8 bits, 0.08 and 0.42 in 4 bits."""

Message = dict[str, str]


class ScoreHead(torch.nn.Linear):
    """The score head, in fp32 whatever the model's dtype: above 8, bf16 has steps of 0.06, and rewards would tie."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return torch.nn.functional.linear(hidden_states.float(), self.weight.float())


@dataclass
class RewardModel:
    """A loaded reward model."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    mean: float
    """Mean of the rewards of held-out answers, for normalization."""
    spread: float
    """Standard deviation of the same rewards."""
    max_length: int
    """Longest conversation it was trained on, in tokens; scores of longer ones mean little."""


def start(model_args: ModelConfig, training_args: TrainingArguments, score_head: str | None = None) -> PreTrainedModel:
    """The language model of a recipe, with an untrained score head in place of its own head.

    Args:
        score_head: A reward model whose score head it gets instead.
    """
    set_seed(training_args.seed)  # for the new head
    device_map = training_device_map(model_args, training_args)
    with suppress_seqcls_warning():
        model = load_pretrained(AutoModelForSequenceClassification, model_args, device_map, num_labels=1)
    _score_in_fp32(model)
    if not training_args.deepspeed_plugin:  # DeepSpeed keeps fp32 master weights itself
        model.score.float()
    if score_head:
        _set_head(model.score.weight, read_tensor(places_of(Path(score_head))[SCORE_HEAD], SCORE_HEAD))
    return model


def check_head(path: str, config: Gemma2Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a reward model whose score head does not fit a model of this config and tokenizer."""
    check(path, tokenizer)
    width = read_shapes(Path(path))[SCORE_HEAD][1]
    if width != config.hidden_size:
        raise UserError(
            f"score_head names {path}, whose head reads {width} values, and the model has {config.hidden_size}; name "
            "a reward model of the same size"
        )


def _set_head(weight: torch.nn.Parameter, values: torch.Tensor) -> None:
    if not hasattr(weight, "ds_id"):
        weight.data.copy_(values)
        return
    from deepspeed.runtime.zero import GatheredParameters  # a slow import

    with GatheredParameters([weight], modifier_rank=0):
        weight.data.copy_(values)


def _score_in_fp32(model: PreTrainedModel) -> None:
    # In place: ZeRO-3 would not shard a new module, and PEFT would not find it.
    model.score.__class__ = ScoreHead


def mean_and_spread(rewards: Iterable[list[float]]) -> tuple[float, float]:
    """Mean and standard deviation of all rewards, for normalization."""
    values = numpy.array([reward for each in rewards for reward in each])
    return float(values.mean()), float(values.std())


def _compute_on(model: PreTrainedModel, device: torch.device) -> None:
    """Lets each module compute on this device, which holds the module's weights only meanwhile."""
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    at_rest: dict[torch.nn.Parameter, torch.Tensor] = {}

    def to_device(module: torch.nn.Module, _: object) -> None:
        for parameter in module.parameters(recurse=False):
            at_rest[parameter] = parameter.data
            parameter.data = parameter.data.to(device)

    def back(module: torch.nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = at_rest.pop(parameter)

    for module in model.modules():
        module.register_forward_pre_hook(to_device)
        module.register_forward_hook(back)


def seal(
    output_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[Message]],
    mean: float,
    spread: float,
    max_length: int,
    device: torch.device,
) -> None:
    """Saves with the weights in `output_dir` what `load` checks: above all, the scores of a few conversations.

    The weights stay mapped from their files; `device` holds one matrix at a time, because the model that was trained
    is still in its memory.

    Args:
        conversations: These few conversations, the canary; each ends with the model's turn.
    """
    unset_hf_deepspeed_config()  # else ZeRO-3 would shard this model too
    model = AutoModelForSequenceClassification.from_pretrained(output_dir, dtype="auto", attn_implementation="eager")
    _score_in_fp32(model)
    _compute_on(model, device)
    rows = [conversation_ids(tokenizer, messages) for messages in conversations]
    scores = score_ids(model, rows, batch_size=1, device=device)
    canary = [{"messages": messages, "score": value} for messages, value in zip(conversations, scores, strict=True)]
    sealed = {"canary": canary, "mean": mean, "spread": spread, "max_length": max_length, **_digests(tokenizer)}
    contract.write_json(output_dir / FILE, sealed)


def check(path: str, policy_tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
    """Checks a reward model without loading its weights; returns what `seal` saved.

    Raises:
        UserError: It is a causal model, an adapter, or unfinished, has another tokenizer, or the like.
    """
    config = load_config(path, wanted=REWARD_MODEL)
    sealed = contract.read_json(Path(path) / FILE)
    if sealed is None:
        raise UserError(
            f"{path} has no {FILE}, so nothing says that its score head was trained; name the output of the "
            "reward stage"
        )
    if SCORE_HEAD not in read_shapes(Path(path)):
        raise UserError(f"{path} lacks {SCORE_HEAD}; train the reward model again")
    if config.num_labels != 1 or config.pad_token_id != PAD:
        raise UserError(
            f"{path} has {config.num_labels} labels and pad id {config.pad_token_id}, not 1 and {PAD}; train the "
            "reward model again"
        )
    for what, digest in _digests(policy_tokenizer or load_tokenizer(path, config)).items():
        if sealed[what] != digest:
            raise UserError(
                f"{path} was trained with another {what.partition('_')[0]} than the policy's (or than this "
                "version's); train the reward model again"
            )
    return sealed


def load(
    path: str,
    policy_tokenizer: PreTrainedTokenizerBase | None = None,
    prepare: Callable[[PreTrainedModel], torch.nn.Module] = lambda model: model,
    quantization: str | None = None,
    device: torch.device | None = None,
) -> RewardModel:
    """The finished output of the reward stage, on the CPU; in bf16 if there is a GPU to move it to, else in fp32.

    Args:
        policy_tokenizer: Tokenizer of the policy to be scored; it must equal the reward model's own.
        prepare: Moves or shards the loaded model before the canary is scored.
        quantization: "4bit", "8bit", or None; a quantized model is not prepared.
        device: Where a quantized model is loaded.

    Raises:
        UserError: `check` refuses it, or the canary's scores do not reproduce.
    """
    sealed = check(path, policy_tokenizer)
    tokenizer = policy_tokenizer or tokenizer_of(path)
    model = read(path, quantization, device)
    model = model.requires_grad_(False).eval() if quantization else prepare(model)
    for canary in sealed["canary"]:
        (found,) = score(model, tokenizer, [canary["messages"]])
        tolerance = max(_CANARY_TOLERANCE[quantization] * sealed["spread"], 0.02 * abs(canary["score"]), 1e-3)
        if not abs(found - canary["score"]) <= tolerance:
            raise UserError(
                f"{path} scores its canary {found:.3f}, but {canary['score']:.3f} when it was made; its "
                "files have changed, train the reward model again"
            )
    return RewardModel(model, tokenizer, sealed["mean"], sealed["spread"], sealed["max_length"])


def read(path: str, quantization: str | None = None, device: torch.device | None = None) -> PreTrainedModel:
    """The weights of a reward model, sealed or not; see `load`."""
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    arguments, device_map = frozen_arguments(path, dtype, quantization), {"": device} if quantization else None
    try:
        model = load_pretrained(AutoModelForSequenceClassification, arguments, device_map)
    except (RuntimeError, SafetensorError) as error:  # shapes that do not match the config, half a file
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} cannot be loaded ({reason}); train the reward model again") from error
    _score_in_fp32(model)
    model.score.float()
    return model


def tokenizer_of(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a reward model."""
    return load_tokenizer(path, load_config(path, wanted=REWARD_MODEL))


def _digests(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    return {
        "tokenizer_digest": tokenizer_digest(tokenizer),
        "template_digest": template_digest(tokenizer.chat_template),
    }


def conversation_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """Token ids of a conversation as a reward model reads it; it scores the last one, the newline after the turn."""
    return tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]


def score(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[Message]],
    batch_size: int = 16,
) -> list[float]:
    """The reward of each conversation; each ends with the model's turn."""
    return score_ids(model, [conversation_ids(tokenizer, messages) for messages in conversations], batch_size)


def score_ids(
    model: torch.nn.Module, rows: list[list[int]], batch_size: int, device: torch.device | None = None
) -> list[float]:
    """The reward of each conversation, given as token ids; computed in right-padded batches, in evaluation mode.

    Args:
        device: Where the model computes, if not where its weights are.
    """
    device = device or next(model.parameters()).device
    was_training = model.training
    model.eval()
    scores: list[float] = []
    with torch.no_grad():
        for start_row in range(0, len(rows), batch_size):
            batch = rows[start_row : start_row + batch_size]
            width = max(map(len, batch))
            ids = torch.tensor([row + [PAD] * (width - len(row)) for row in batch], device=device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=device)
            scores += model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float().tolist()
    model.train(was_training)
    return scores
