"""The keys that the recipes of all training stages share."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from gemma2_post.data.keys import DataArguments
from gemma2_post.evaluation.keys import SampleArguments
from gemma2_post.models.arguments import MODEL_BOUNDS
from gemma2_post.stage.bounds import COUNT, NOT_NEGATIVE, POSITIVE, SEED, SHARE, Bounds
from gemma2_post.stage.recipe import key, keys_of, part

if TYPE_CHECKING:
    from trl import ModelConfig

SEEDS_APART = 1000
"""Seed distance between two members of an entry; runs with neighboring seeds then share none."""
_LIMIT = Bounds(at_least=1, also=-1)
_BELOW_1 = Bounds(at_least=0, below=1)

TRAINING_BOUNDS = {
    "num_train_epochs": POSITIVE, "max_steps": _LIMIT, "learning_rate": POSITIVE, "seed": SEED, "data_seed": SEED,
    "per_device_train_batch_size": COUNT, "per_device_eval_batch_size": COUNT, "max_length": COUNT,
    "warmup_steps": NOT_NEGATIVE, "warmup_ratio": SHARE, "weight_decay": NOT_NEGATIVE, "max_grad_norm": NOT_NEGATIVE,
    "adam_beta1": _BELOW_1, "adam_beta2": _BELOW_1, "adam_epsilon": POSITIVE, "label_smoothing_factor": _BELOW_1,
    "neftune_noise_alpha": POSITIVE, "logging_steps": POSITIVE, "eval_steps": POSITIVE, "save_steps": POSITIVE,
    "eval_delay": NOT_NEGATIVE, "save_total_limit": COUNT, "torch_empty_cache_steps": COUNT,
    "dataloader_num_workers": NOT_NEGATIVE, "dataloader_prefetch_factor": COUNT, "dataset_num_proc": COUNT,
    "ddp_timeout": COUNT, "ddp_bucket_cap_mb": COUNT, "center_rewards_coefficient": NOT_NEGATIVE,
    "max_completion_length": COUNT, "num_generations": Bounds(at_least=2), "temperature": POSITIVE,
    "top_p": Bounds(above=0, at_most=1), "top_k": NOT_NEGATIVE, "min_p": SHARE, "repetition_penalty": POSITIVE,
    "vllm_gpu_memory_utilization": Bounds(above=0, at_most=1), "vllm_tensor_parallel_size": COUNT,
    "vllm_server_timeout": POSITIVE, "vllm_max_model_length": COUNT, "epsilon": NOT_NEGATIVE,
    "epsilon_high": NOT_NEGATIVE, "num_completions_to_print": COUNT, "num_generations_eval": COUNT,
}  # fmt: skip
"""The values that keys of TRL's classes may have, where TRL itself would fail late or train nothing."""


def decisive(values: dict[str, object]) -> dict[str, object]:
    """The share of the training rows that is held out, where no other rows are."""
    share = keys_of(DataArguments)["held_out_share"]
    return {} if values.get("held_out_datasets") else {share.name: values.get(share.name, share.default)}


@dataclass(kw_only=True)
class TrainingRecipe:
    """The recipe of a training stage; in `training`, each stage names its own config class of TRL."""

    trains_score_head: ClassVar[bool] = False
    """Whether a score head is trained in addition to the model."""

    training: Any = part("transformers:TrainingArguments")
    model: "ModelConfig" = part("trl:ModelConfig", bounds=MODEL_BOUNDS)
    data: DataArguments = part(DataArguments)
    samples: SampleArguments = part(SampleArguments)
    global_batch_size: int = key(
        help="Rows per optimizer step over all processes; accumulation follows from it.", bounds=COUNT
    )
    save_dtype: Literal["float32", "bfloat16"] = key(
        "bfloat16", "Type of the saved weights; they are rounded to it once, at the end."
    )
    training_seed: int | None = key(
        None,
        "Seed of the training alone; the mixture and the held-out rows follow seed. A pipeline sets it for members.",
        bounds=SEED,
    )

    @property
    def trains_model(self) -> bool:
        """Whether more than a score head is trained."""
        return True

    def seed_of(self, member: int = 0) -> int:
        """The seed to train with once the held-out rows are chosen, which the members of an entry share."""
        return self.training.seed + SEEDS_APART * member if self.training_seed is None else self.training_seed

    @property
    def quantization(self) -> str | None:
        """How the base is quantized: `4bit`, `8bit` or None."""
        return "4bit" if self.model.load_in_4bit else "8bit" if self.model.load_in_8bit else None
