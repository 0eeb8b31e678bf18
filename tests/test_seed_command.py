"""The 27b recipes of `sft` against the well-known commands for the same model, argument by argument.

The commands are those of https://huggingface.co/blog/gemma2, "Fine-tuning with TRL". Every argument must reach the
trainer through our recipe; `DIFFERS` and `ADDED` name, with the reason, what deliberately does not.
"""

import shlex
from pathlib import Path

import pytest
from trl import get_peft_config, get_quantization_config

from gemma2_post import sft
from gemma2_post.stage import command_line, launcher
from gemma2_post.stage.recipe import values_of
from gemma2_post.stage.recipe_file import load_recipe

QLORA = """
python examples/scripts/sft.py
    --model_name google/gemma-2-27b
    --dataset_name OpenAssistant/oasst_top1_2023-08-25
    --dataset_text_field="text"
    --per_device_train_batch_size 1
    --per_device_eval_batch_size 1
    --gradient_accumulation_steps 4
    --learning_rate 2e-4
    --report_to wandb
    --bf16
    --max_seq_length 1024
    --lora_r 16 --lora_alpha 32
    --lora_target_modules q_proj k_proj v_proj o_proj
    --load_in_4bit
    --use_peft
    --attn_implementation eager
    --logging_steps=10
    --gradient_checkpointing
    --output_dir models/gemma2
"""
ZERO_3 = """
accelerate launch --config_file=examples/accelerate_configs/deepspeed_zero3.yaml examples/scripts/sft.py
    --model_name google/gemma-2-27b
    --dataset_name OpenAssistant/oasst_top1_2023-08-25
    --dataset_text_field="text"
    --per_device_train_batch_size 1
    --per_device_eval_batch_size 1
    --gradient_accumulation_steps 4
    --learning_rate 2e-5
    --report_to wandb
    --bf16
    --max_seq_length 1024
    --attn_implementation eager
    --logging_steps=10
    --gradient_checkpointing
    --output_dir models/gemma2
"""
COMMANDS = {
    "sft": (QLORA, "accelerate_configs/single_gpu.yaml"),
    "sft-full": (ZERO_3, "accelerate_configs/deepspeed_zero3_multi_node.yaml"),
}
"""By recipe: the command, and how the recipe is launched."""

NAMES_OF_TODAY = {"model_name": "model_name_or_path", "max_seq_length": "max_length"}
"""Arguments that TRL has renamed since."""
DIFFERS = {
    "dataset_text_field": "rows become messages, so that the loss is on the model's turns only",
    "report_to": "a tracker needs an account; the recipe runs without one",
    "output_dir": "each recipe has a folder of its own",
}
ADDED = {
    "dtype": "bf16, which Gemma 2 was released in; the command leaves it to the defaults of its time",
    "num_train_epochs": "one pass; the command's default of three repeats 13,000 conversations",
    "lr_scheduler_type": "cosine, with a warmup, against the default of linear without one",
    "warmup_steps": "belongs to lr_scheduler_type",
    "global_batch_size": "gradient_accumulation_steps follows from it, on any number of GPUs",
    "held_out_datasets": "the command measures nothing that it has not trained on",
    "max_invalid_share": "rows that are no conversation are dropped and counted up to this share",
    "max_too_long_share": "rows above max_length are dropped and counted; the command cuts them",
    "save_steps": "the default of 500, written out; training all weights takes longer a step, so 100 there",
    "save_total_limit": "checkpoints of a 27b fill a disk",
    "seed": "any seed will do",
    "num_samples": "the command samples no answers",
    "max_new_tokens": "the command samples no answers",
}


def arguments_of(command: str) -> dict[str, object]:
    """The arguments of a command's script, by the names of today."""
    words = shlex.split(command)
    script = words.index("examples/scripts/sft.py")
    _, arguments = command_line.read(words[script + 1 :], needs_config=False, is_boolean=lambda key: True)
    return {NAMES_OF_TODAY.get(name, name): value for name, value in arguments.items()}


def built(name: str) -> sft.Recipe:
    """The recipe as `sft` builds it."""
    values = load_recipe(f"recipes/gemma-2-27b/{name}.yaml") | {"use_cpu": True}
    return sft.COMMAND.build(values, launcher.read(COMMANDS[name][1]))[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_of_the_command_reaches_the_trainer(name: str) -> None:
    expected, recipe = arguments_of(COMMANDS[name][0]), built(name)
    found = values_of(recipe) | {"dataset_name": recipe.data.datasets[0].path}
    assert len(recipe.data.datasets) == 1
    assert {key: found[key] for key in expected if key not in DIFFERS} == {
        key: value for key, value in expected.items() if key not in DIFFERS
    }
    assert all(found[key] != expected[key] for key in ("report_to", "output_dir"))
    assert "dataset_text_field" in sft.REFUSED


def test_the_adapter_is_that_of_the_command() -> None:
    """Also where the command says nothing: type, dropout, and quantization are still TRL's defaults."""
    model_args = built("sft").model
    peft_config = get_peft_config(model_args)
    assert (peft_config.r, peft_config.lora_alpha, peft_config.lora_dropout) == (16, 32, 0.05)
    assert peft_config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    quantization = get_quantization_config(model_args)
    assert quantization.load_in_4bit and quantization.bnb_4bit_quant_type == "nf4"
    assert get_peft_config(built("sft-full").model) is None


@pytest.mark.parametrize("name", COMMANDS)
def test_a_recipe_adds_nothing_without_a_reason(name: str) -> None:
    values = load_recipe(Path("recipes/gemma-2-27b") / f"{name}.yaml")
    given = arguments_of(COMMANDS[name][0]).keys() | {"datasets"}
    assert values.keys() - given <= ADDED.keys()
    assert all(ADDED.values()) and all(DIFFERS.values())
