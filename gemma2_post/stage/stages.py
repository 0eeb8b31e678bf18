"""The stages by name, with their modules. A new stage is a module and a line here."""

from importlib import import_module

from gemma2_post.stage.command import Command

STAGES = {
    "synthesize": "gemma2_post.synthesize",
    "sft": "gemma2_post.sft",
    "distill": "gemma2_post.distill",
    "reward": "gemma2_post.reward",
    "rlhf": "gemma2_post.rlhf",
    "warp": "gemma2_post.warp",
    "evaluate": "gemma2_post.evaluate",
}


def command_of(stage: str) -> Command:
    """A stage's command; its module imports nothing that takes long."""
    return import_module(STAGES[stage]).COMMAND
