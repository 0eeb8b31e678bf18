"""Checks of what a recipe says about a Gemma 2 model: refuses what cannot work before anything is loaded."""

import re
from typing import TYPE_CHECKING

from gemma2_post.models.shapes import SCORE_HEAD, tensor_shapes
from gemma2_post.stage.bounds import COUNT, Bounds
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.launcher import Launcher

if TYPE_CHECKING:
    from transformers import Gemma2Config, TrainingArguments
    from trl import ModelConfig

MODEL_BOUNDS = {"lora_r": COUNT, "lora_alpha": COUNT, "lora_dropout": Bounds(at_least=0, below=1)}
"""The values that keys of TRL's `ModelConfig` may have."""
LORA_TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
_MATRICES = "name some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
ATTENTION = ("eager", "flex_attention", "flash_attention_2")
"""Attention implementations that apply Gemma 2's soft-cap; the first is the default."""

REFUSED_KEYS = {
    "gradient_accumulation_steps": "it follows from global_batch_size, per_device_train_batch_size and the number of "
    "processes; set global_batch_size",
    "fp16": "Gemma 2 overflows in fp16 (the mask's -65504 plus a soft-capped score is -inf); use bf16 or neither",
    "fp16_full_eval": "Gemma 2 overflows in fp16; remove it",
    "bf16_full_eval": "it would round the trained weights in place before they are saved; remove it",
    "hub_token": "it would be saved with the weights; log in with `hf auth login`",
    "save_only_model": "a run could not be resumed; remove it",
    "ignore_data_skip": "a resumed run would see other rows; remove it",
    "deepspeed": "it belongs in an accelerate config, see accelerate_configs/",
    "fsdp": "sharding is by DeepSpeed here, see accelerate_configs/",
    "fsdp_config": "sharding is by DeepSpeed here, see accelerate_configs/",
    "auto_find_batch_size": "it would change the global batch; lower per_device_train_batch_size instead",
    "enable_jit_checkpoint": "a stage that is asked to end would pass for a finished one; remove it",
    "use_liger_kernel": "its fused losses replace TRL's, which apply Gemma 2's soft-cap; remove it",
    "label_smoothing_factor": "it builds the full logits of a 256k vocabulary; remove it",
    "model_init_kwargs": "use model_name_or_path, model_revision, dtype and attn_implementation",
    "eos_token": "Gemma 2's stop tokens <eos> and <end_of_turn> are set for you; remove it",
    "pad_token": "Gemma 2's <pad> is set for you; remove it",
    "chat_template_path": "the Gemma 2 chat format is set for you; remove it",
    "lora_task_type": "it follows from the stage; remove it",
    "resume_from_checkpoint": "the newest checkpoint in output_dir is resumed automatically; remove it",
    "prediction_loss_only": "it is always on, because the full logits of a 256k vocabulary do not fit; remove it",
}
"""Keys of TRL's config classes that no stage accepts, with the reason."""


def check_arguments(launcher: Launcher, model_args: "ModelConfig", training_args: "TrainingArguments") -> None:
    """Raises a `UserError` for combinations that cannot work or would train incorrectly."""
    zero_stage = launcher.zero_stage
    quantized = model_args.load_in_4bit or model_args.load_in_8bit
    if quantized and not model_args.use_peft:
        raise UserError(
            f"load_in_{'4' if model_args.load_in_4bit else '8'}bit is for adapters, not for full "
            "fine-tuning; add use_peft: true or remove it"
        )
    check_model_arguments(model_args)
    if quantized and zero_stage == 3:
        raise UserError(
            "a quantized base cannot be sharded by ZeRO-3; use accelerate_configs/multi_gpu.yaml or "
            "accelerate_configs/deepspeed_zero2.yaml"
        )
    if training_args.n_gpu > 1:
        raise UserError(
            f"{training_args.n_gpu} GPUs are visible to one process; start it with "
            "accelerate_configs/multi_gpu.yaml, or show it one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if launcher.mixed_precision != "no" and not training_args.bf16:  # with bf16: true, "no" is bf16, too
        raise UserError(
            f"bf16 is false, but accelerate was started with mixed precision {launcher.mixed_precision}; "
            "make them agree (Gemma 2 overflows in fp16)"
        )
    if not model_args.use_peft and model_args.dtype == "bfloat16" and not zero_stage:
        raise UserError(
            "dtype is bfloat16 in full fine-tuning without DeepSpeed, where small updates are rounded away; "
            "write dtype: float32 (bf16: true still computes in bfloat16)"
        )
    if not model_args.use_peft and zero_stage == 3 and not launcher.saves_16bit_model:
        raise UserError(
            "full fine-tuning under ZeRO-3 needs zero3_save_16bit_model: true in the accelerate config, "
            "else no weights are saved"
        )
    adapted = {*(model_args.lora_target_modules or []), *(model_args.lora_modules_to_save or [])}
    if model_args.use_peft and (tied := {"embed_tokens", "lm_head"} & adapted):
        raise UserError(
            f"{min(tied)} cannot be adapted, because Gemma 2 ties its embeddings and its head; "
            "remove it from lora_target_modules and lora_modules_to_save"
        )


def check_model_arguments(model_args: "ModelConfig") -> None:
    """Raises a `UserError` for ways of loading a Gemma 2 model that cannot work or would give wrong results."""
    from transformers.utils import is_flash_attn_greater_or_equal

    if model_args.model_name_or_path is None:
        raise UserError("model_name_or_path is missing; name a directory or a Hub model")
    attention = attention_of(model_args)
    if attention == "sdpa":
        raise UserError(
            "attn_implementation is sdpa, which cannot apply Gemma 2's attention soft-cap of 50; "
            "write eager, flex_attention or flash_attention_2"
        )
    if attention not in ATTENTION:
        raise UserError(f"attn_implementation is {attention}; write eager, flex_attention or flash_attention_2")
    if attention == "flash_attention_2" and not is_flash_attn_greater_or_equal("2.6.3"):
        raise UserError(
            "attn_implementation is flash_attention_2, but the flash-attn package (2.6.3 or newer, for the "
            "soft-cap and its gradient) is not installed; install it, or write eager or flex_attention"
        )
    if model_args.dtype not in ("bfloat16", "float32"):
        raise UserError(
            f"dtype is {model_args.dtype}; write bfloat16 or float32 (Gemma 2 overflows in float16, and auto "
            "would hide whether full fine-tuning runs in pure bfloat16)"
        )
    if (model_args.load_in_4bit or model_args.load_in_8bit) and model_args.dtype != "bfloat16":
        raise UserError(
            f"dtype is {model_args.dtype} with quantized weights; write bfloat16 (else embeddings and norms "
            "stay in fp32)"
        )


def check_lora_modules(model_args: "ModelConfig", config: "Gemma2Config") -> None:
    """Refuses names of modules that match nothing: PEFT drops them if another one matches.

    PEFT matches a name with a whole module name or its end, and a single target as a regular expression.
    """
    weights = tensor_shapes(config.to_dict(), model_args.model_name_or_path)
    modules = [name.removesuffix(".weight") for name in weights] + [SCORE_HEAD.removesuffix(".weight")]
    matrices = [name for name in modules if name.endswith("_proj")]
    targets = model_args.lora_target_modules or []
    if isinstance(targets, str):
        if targets != "all-linear" and not _matches(targets, matrices):
            raise UserError(f"lora_target_modules is {targets}, which matches no matrix of the model; {_MATRICES}")
        targets = []
    for key, names, known in (
        ("lora_target_modules", targets, matrices),
        ("lora_modules_to_save", model_args.lora_modules_to_save or [], modules),
    ):
        for name in names:
            if not any(module == name or module.endswith(f".{name}") for module in known):
                raise UserError(f"{key} has {name}, which matches no module of the model; {_MATRICES}")


def _matches(pattern: str, names: list[str]) -> bool:
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error:
        return False


def attention_of(model_args: "ModelConfig") -> str:
    """The attention implementation of a recipe, or the default."""
    return model_args.attn_implementation or ATTENTION[0]


def complete_model_arguments(model_args: "ModelConfig") -> None:
    """Fills in Gemma 2's defaults: eager attention, and the modules that LoRA adapts."""
    model_args.attn_implementation = attention_of(model_args)
    if model_args.use_peft:
        targets = model_args.lora_target_modules or LORA_TARGET_MODULES
        # TRL makes a text of a list of one name, which PEFT would match with whole names only.
        model_args.lora_target_modules = [targets] if isinstance(targets, str) and targets.isidentifier() else targets


def check_length(max_length: int | None, config: "Gemma2Config") -> int:
    """The longest row in tokens: `max_length`, or all positions of the model; more are a `UserError`."""
    most = config.max_position_embeddings
    if max_length is not None and max_length > most:
        raise UserError(f"max_length is {max_length}, more than the {most} positions of the model; lower it")
    return max_length or most


def check_prompt_length(
    max_prompt_length: int | None,
    answer_key: str,
    longest_answer: int | None,
    positions: int,
    whose: str = "the model's",
) -> int:
    """The longest prompt in tokens: `max_prompt_length`, or the positions that the longest answer leaves.

    Args:
        answer_key: The recipe's key for `longest_answer`.
        positions: Number of positions of the model, in tokens.
        whose: Whose positions they are, for the error message.

    Raises:
        UserError: There is no longest answer, or prompt and answer do not fit into the positions.
    """
    if longest_answer is None:
        raise UserError(f"{answer_key} is none; write a number of tokens")
    most = positions - longest_answer
    if most < (max_prompt_length or 1):
        raise UserError(
            f"{answer_key} {longest_answer} leaves {max(0, most)} of {whose} {positions} positions for a "
            f"prompt of max_prompt_length {max_prompt_length or 1}; lower one of them"
        )
    return max_prompt_length or most
