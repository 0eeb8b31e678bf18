"""The stages by name, with their modules. To add a stage, write its module and add a line here."""

from importlib import import_module

from gemma2_post.stage.command import Command

STAGES = {
    "synthesize": "gemma2_post.synthesize",
    "curate": "gemma2_post.curate",
    "sft": "gemma2_post.sft",
    "distill": "gemma2_post.distill",
    "reward": "gemma2_post.reward",
    "warm": "gemma2_post.warm",
    "rlhf": "gemma2_post.rlhf",
    "select": "gemma2_post.select",
    "warp": "gemma2_post.warp",
    "evaluate": "gemma2_post.evaluate",
}


def command_of(stage: str) -> Command:
    """The command of a stage; its module imports nothing slow."""
    return import_module(STAGES[stage]).COMMAND
