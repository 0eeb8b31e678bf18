"""What is special about Gemma 2: the chat format, the tokenizer's ids, and how its models may be loaded and saved."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import is_flash_attn_greater_or_equal
from trl import ModelConfig, get_quantization_config
from trl.chat_template_utils import gemma_chat_template

from gemma2_post.core import contract, digests
from gemma2_post.core.errors import UserError
from gemma2_post.core.launcher import Launcher
from gemma2_post.core.tokens import BOS, EOS, PAD, SPECIAL_TOKENS, STOP_TOKEN_IDS

SCORE_HEAD = "score.weight"
SHAPES = {
    f"google/gemma-2-{size}": Gemma2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        query_pre_attn_scalar=scalar,
    )
    for size, hidden, intermediate, layers, heads, kv_heads, head_dim, scalar in [
        ("2b", 2304, 9216, 26, 8, 4, 256, 256),
        ("9b", 3584, 14336, 42, 16, 8, 256, 256),
        ("27b", 4608, 36864, 46, 32, 16, 128, 144),
    ]
}
"""By Hub name without `-it`, for what is planned before anything is downloaded (arXiv 2408.00118, table 1)."""
LORA_TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]

TRAINING_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- '<start_of_turn>user\\n' + message['content'] | trim + '<end_of_turn>\\n' -}}"
    "{%- else -%}"
    "{{- '<start_of_turn>model\\n' -}}"
    "{%- generation -%}"
    "{{- message['content'] | trim + '<end_of_turn>' -}}"
    "{%- if loop.last -%}{{- eos_token -}}{%- endif -%}"
    "{%- endgeneration -%}"
    "{%- if not loop.last -%}{{- '\\n' -}}{%- endif -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
"""Renders a conversation to train on; what is saved with a model is the inference template.

`<eos>` follows the last `<end_of_turn>` at once, as in the Gemma 2 report (arXiv 2408.00118, section 4 and table 4).
The generation block marks what the model says itself: its words, each of its `<end_of_turn>`, the final `<eos>`.
"""

REFUSED_KEYS = {
    "gradient_accumulation_steps": "it follows from global_batch_size, per_device_train_batch_size and the number of "
    "processes; set global_batch_size",
    "fp16": "Gemma 2 overflows in fp16 (the mask's -65504 plus a soft-capped score is -inf); use bf16 or neither",
    "fp16_full_eval": "Gemma 2 overflows in fp16; remove it",
    "bf16_full_eval": "it would round the trained weights in place before they are saved; remove it",
    "hub_token": "it would be written beside the weights; log in with `hf auth login`",
    "save_only_model": "a run could not be resumed; remove it",
    "ignore_data_skip": "a resumed run would see other rows; remove it",
    "deepspeed": "it belongs into an accelerate config, see accelerate_configs/",
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
    "resume_from_checkpoint": "the newest checkpoint in output_dir is resumed by itself; remove it",
    "prediction_loss_only": "it is always on, because the full logits of a 256k vocabulary do not fit; remove it",
}
"""Keys of TRL's config classes that no stage accepts, with the reason."""


# --- checks before anything is loaded ---


def check_arguments(where: str, launcher: Launcher, model_args: ModelConfig, training_args: TrainingArguments) -> None:
    """Refuses combinations that cannot work or train wrongly, and fills in Gemma 2's own defaults.

    Args:
        where: the recipe's file, named first in an error.
    """
    zero_stage = launcher.zero_stage
    quantized = model_args.load_in_4bit or model_args.load_in_8bit
    if quantized and not model_args.use_peft:
        raise UserError(
            f"{where}: load_in_{'4' if model_args.load_in_4bit else '8'}bit is for adapters, not for full "
            "fine-tuning; add use_peft: true or remove it"
        )
    check_model_arguments(where, model_args)
    if quantized and zero_stage == 3:
        raise UserError(
            f"{where}: a quantised base cannot be sharded by ZeRO-3; use accelerate_configs/multi_gpu.yaml or "
            "accelerate_configs/deepspeed_zero2.yaml"
        )
    if training_args.n_gpu > 1:
        raise UserError(
            f"{where}: {training_args.n_gpu} GPUs are visible to one process; start it with "
            "accelerate_configs/multi_gpu.yaml, or show it one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if launcher.mixed_precision != "no" and not training_args.bf16:  # with bf16: true, "no" is bf16, too
        raise UserError(
            f"{where}: bf16 is false, but accelerate was started with mixed precision {launcher.mixed_precision}; "
            "make them agree (Gemma 2 overflows in fp16)"
        )
    if not model_args.use_peft and model_args.dtype == "bfloat16" and not zero_stage:
        raise UserError(
            f"{where}: dtype is bfloat16 in full fine-tuning without DeepSpeed, where small updates are rounded away; "
            "write dtype: float32 (bf16: true still computes in bfloat16)"
        )
    if not model_args.use_peft and zero_stage == 3 and not launcher.saves_16bit_model:
        raise UserError(
            f"{where}: full fine-tuning under ZeRO-3 needs zero3_save_16bit_model: true in the accelerate config, "
            "else no weights are saved"
        )
    if model_args.use_peft:
        model_args.lora_target_modules = model_args.lora_target_modules or LORA_TARGET_MODULES
        tied = {"embed_tokens", "lm_head"} & {
            *model_args.lora_target_modules,
            *(model_args.lora_modules_to_save or []),
        }
        if tied:
            raise UserError(
                f"{where}: {min(tied)} cannot be adapted, because Gemma 2 ties its embeddings and its head; "
                "remove it from lora_target_modules and lora_modules_to_save"
            )


def check_model_arguments(where: str, model_args: ModelConfig) -> None:
    """Refuses ways of loading a Gemma 2 model that cannot work or are wrong, and fills in eager attention."""
    model_args.attn_implementation = model_args.attn_implementation or "eager"
    if model_args.model_name_or_path is None:
        raise UserError(f"{where}: model_name_or_path is missing; name a directory or a Hub model")
    if model_args.attn_implementation == "sdpa":
        raise UserError(
            f"{where}: attn_implementation is sdpa, which cannot apply Gemma 2's attention soft-cap of 50; "
            "write eager, flex_attention or flash_attention_2"
        )
    if model_args.attn_implementation not in ("eager", "flex_attention", "flash_attention_2"):
        raise UserError(
            f"{where}: attn_implementation is {model_args.attn_implementation}; "
            "write eager, flex_attention or flash_attention_2"
        )
    if model_args.attn_implementation == "flash_attention_2" and not is_flash_attn_greater_or_equal("2.6.3"):
        raise UserError(
            f"{where}: attn_implementation is flash_attention_2, but the flash-attn package (2.6.3 or newer, for the "
            "soft-cap and its gradient) is not installed; install it, or write eager or flex_attention"
        )
    if model_args.dtype not in ("bfloat16", "float32"):
        raise UserError(
            f"{where}: dtype is {model_args.dtype}; write bfloat16 or float32 (Gemma 2 overflows in float16, and auto "
            "would hide whether full fine-tuning runs in pure bfloat16)"
        )
    if (model_args.load_in_4bit or model_args.load_in_8bit) and model_args.dtype != "bfloat16":
        raise UserError(
            f"{where}: dtype is {model_args.dtype} with quantised weights; write bfloat16 (else embeddings and norms "
            "stay in fp32)"
        )


def load_config(where: str, path: str, revision: str | None = None) -> Gemma2Config:
    """The model's config: read before its weights are downloaded, so that what is wrong shows early."""
    local = Path(path)
    if (local / "adapter_config.json").is_file() and not (local / "config.json").is_file():
        raise UserError(
            f"{where}: {path} is an adapter, not a model; merge it into its base first, or name a merged model"
        )
    if local.is_dir() and not (local / "config.json").is_file():
        raise UserError(f"{where}: {path} has no config.json; name the output of a finished stage or a Hub model")
    if (local / contract.BEGUN).is_file() and not (local / contract.DONE).is_file():
        raise UserError(f"{where}: {path} is not finished; run the stage that makes it to its end")
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except OSError as error:
        raise load_error(where, path, error) from error
    if config.model_type != "gemma2":
        raise UserError(f"{where}: {path} is a {config.model_type} model; this pipeline is for gemma2")
    if getattr(config, "quantization_config", None):
        raise UserError(f"{where}: {path} is quantised; name the unquantised model and set load_in_4bit instead")
    return config


def check_length(where: str, max_length: int | None, config: Gemma2Config) -> int:
    """The longest row in tokens: `max_length`, or all positions of the model, which nothing else would check."""
    most = config.max_position_embeddings
    if max_length is not None and max_length > most:
        raise UserError(f"{where}: max_length is {max_length}, more than the {most} positions of the model; lower it")
    return max_length or most


def check_prompt_length(
    where: str,
    max_prompt_length: int | None,
    answer_key: str,
    longest_answer: int | None,
    positions: int,
    whose: str = "the model's",
) -> int:
    """The longest prompt in tokens: `max_prompt_length`, or what the longest answer leaves of the model's positions.

    Args:
        answer_key: the recipe's key of `longest_answer`.
        whose: the positions are, in words.
    """
    if longest_answer is None or longest_answer < 1:
        raise UserError(f"{where}: {answer_key} is {longest_answer}; write a number of tokens, 1 or more")
    if max_prompt_length is not None and max_prompt_length < 1:
        raise UserError(f"{where}: max_prompt_length is {max_prompt_length}; write a number of tokens, or remove it")
    most = positions - longest_answer
    if most < (max_prompt_length or 1):
        raise UserError(
            f"{where}: {answer_key} {longest_answer} leaves {max(0, most)} of {whose} {positions} positions for a "
            f"prompt of max_prompt_length {max_prompt_length or 1}; lower one of them"
        )
    return max_prompt_length or most


def num_parameters(config: Gemma2Config) -> int:
    """Parameters of the causal language model, the tied head counted once."""
    attention = 2 * config.hidden_size * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size + 4 * config.hidden_size
    return config.vocab_size * config.hidden_size + config.num_hidden_layers * layer + config.hidden_size


def load_error(where: str, path: str, error: OSError) -> UserError | OSError:
    """What to do when a model cannot be loaded; a full disk is left to speak for itself."""
    if error.errno == errno.ENOSPC:
        return error
    reason = str(error).strip().splitlines()[0]
    if Path(path).is_dir():
        return UserError(f"{where}: {path} cannot be loaded ({reason}); name the output of a finished stage")
    return UserError(
        f"{where}: cannot get {path}: it is no local directory, and the Hub does not hand it out; if it is gated, "
        f"accept its licence at https://huggingface.co/{path} and log in with `hf auth login` (a token alone does not "
        f"do); if this machine is offline, download it elsewhere and give the directory ({reason})"
    )


# --- tokenizer and chat format ---


def load_tokenizer(
    where: str, path: str, config: Gemma2Config, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer, checked against the ids of Gemma and the model's vocabulary, with the Gemma 2 chat template."""
    # Without its file, transformers builds a GemmaTokenizer of five tokens and says nothing.
    if Path(path).is_dir() and not (Path(path) / "tokenizer.json").is_file():
        raise UserError(f"{where}: {path} has no tokenizer.json; copy the base model's tokenizer files there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except OSError as error:
        raise load_error(where, path, error) from error
    if len(tokenizer) != config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer in {path} has {len(tokenizer)} tokens and the model {config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    vocabulary = tokenizer.get_vocab()
    for token, expected in SPECIAL_TOKENS.items():
        if vocabulary.get(token) != expected:
            raise UserError(
                f"{where}: the tokenizer in {path} has {token} at id {vocabulary.get(token)}, not {expected}; "
                "use a Gemma 2 tokenizer"
            )
    tokenizer.chat_template = gemma_chat_template
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token = "<pad>", "<eos>", "<bos>"
    return tokenizer


def check_same_vocabulary(
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    model_args: ModelConfig,
    teacher_config: Gemma2Config,
    teacher_args: ModelConfig,
) -> None:
    """Refuses a teacher that means another token by an id than the student; TRL compares sizes only."""
    path, revision = teacher_args.model_name_or_path, teacher_args.model_revision
    teacher_tokenizer = load_tokenizer(where, path, teacher_config, revision)
    ours, theirs = (
        {token_id: token for token, token_id in each.get_vocab().items()} for each in (tokenizer, teacher_tokenizer)
    )
    for token_id in sorted(ours.keys() | theirs.keys()):
        if ours.get(token_id) != theirs.get(token_id):
            raise UserError(
                f"{where}: id {token_id} is {ours.get(token_id)!r} to the student {model_args.model_name_or_path} and "
                f"{theirs.get(token_id)!r} to the teacher {path}; choose a teacher with the same vocabulary"
            )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of every token and its id."""
    return digests.of_text(json.dumps(sorted(tokenizer.get_vocab().items())))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, output_dir: Path) -> None:
    """Saves it as it was loaded: padding a batch leaves settings in the tokenizer that would be saved, too."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(output_dir)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> dict[str, list[int]]:
    """A conversation to train on: `input_ids` and `labels`, -100 where there is no loss; lists of the same length."""
    encoded = tokenizer.apply_chat_template(
        messages, chat_template=TRAINING_TEMPLATE, return_dict=True, return_assistant_tokens_mask=True
    )
    labels = [
        token if spoken else -100
        for token, spoken in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    ]
    return {"input_ids": encoded["input_ids"], "labels": labels}


# --- models ---


def load_for_training(where: str, model_args: ModelConfig, training_args: TrainingArguments) -> PreTrainedModel:
    """The causal language model for a trainer: a quantised one on its device, any other where the trainer moves it
    from (or shards it, under ZeRO-3)."""
    quantized = model_args.load_in_4bit or model_args.load_in_8bit
    return load_model(where, model_args, device_map={"": training_args.device} if quantized else None)


@contextmanager
def unsharded(training_args: TrainingArguments) -> Iterator[None]:
    """Within it a model is loaded whole, also under ZeRO-3, which otherwise shards each model that is loaded."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if training_args.deepspeed_plugin:
            training_args.deepspeed_plugin.set_deepspeed_weakref()


def load_model(where: str, model_args: ModelConfig, device_map: str | dict | None) -> PreTrainedModel:
    """The causal language model as the recipe wants it."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            dtype=getattr(torch, model_args.dtype),
            attn_implementation=model_args.attn_implementation,
            quantization_config=get_quantization_config(model_args),
            device_map=device_map,
        )
    except OSError as error:
        raise load_error(where, model_args.model_name_or_path, error) from error
    disable_cpu_repacking(model)
    model.generation_config = generation_config()
    return model


def disable_cpu_repacking(model: PreTrainedModel) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights in an evaluation forward on a CPU with AVX512-BF16.

    The repacked weights are then read as if they were not: later gradients and merges are wrong, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def generation_config() -> GenerationConfig:
    """Both stop tokens, always: a Gemma 2 turn ends with `<end_of_turn>`, a conversation with `<eos>`."""
    return GenerationConfig(bos_token_id=BOS, eos_token_id=STOP_TOKEN_IDS, pad_token_id=PAD)


def save_model(
    model: PreTrainedModel, state_dict: dict[str, torch.Tensor], output_dir: Path, dtype: torch.dtype
) -> None:
    """Writes a directory that its `Auto` class loads: weights, config, and of a language model the generation config.

    One canonical layout: a language model's head is the embedding (ZeRO-1 and 2 hand both over), each tensor is
    rounded once to `dtype`, and a reward model's score head is in fp32.
    """
    head, embedding = state_dict.pop("lm_head.weight", None), state_dict["model.embed_tokens.weight"]
    if head is not None and not torch.equal(head, embedding):
        raise RuntimeError("lm_head and embed_tokens differ: training has untied them")
    empty = [name for name, tensor in state_dict.items() if tensor.numel() == 0]
    if empty:
        raise RuntimeError(f"{empty[0]} is empty: the shards of the model were not gathered")
    rounded = {name: tensor.to(torch.float32 if name == SCORE_HEAD else dtype) for name, tensor in state_dict.items()}
    model.save_pretrained(output_dir, state_dict=rounded)
    save_configs(model, output_dir, dtype)


def save_configs(model: PreTrainedModel, output_dir: Path, dtype: torch.dtype) -> None:
    """Writes what stands beside weights that are saved in `dtype`, whatever the type of the model."""
    if model.can_generate():
        generation_config().save_pretrained(output_dir)
    config = model.config
    config.architectures = [type(model).__name__]
    config.__dict__.pop("cache_implementation", None)  # "hybrid" in Google's files, which transformers 5 dropped
    config.update({"use_cache": True, "dtype": dtype, "eos_token_id": EOS, "bos_token_id": BOS, "pad_token_id": PAD})
    config.save_pretrained(output_dir)


def merge_adapter(
    adapter_dir: Path, model_args: ModelConfig, model_class: type[PreTrainedModel], **config: object
) -> PreTrainedModel:
    """The unquantised base with the adapter added in fp32, on the CPU.

    Merging into the 4-bit base would quantise the sum again; in bf16 a part of the update would be rounded away.

    Args:
        config: what the model's config has in place of the base's.
    """
    unset_hf_deepspeed_config()  # else ZeRO-3 would shard this model, too
    base = model_class.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=torch.float32,
        attn_implementation=model_args.attn_implementation,
        **config,
    )
    return PeftModel.from_pretrained(base, adapter_dir, torch_device="cpu").merge_and_unload()
