"""The RLHF stage, in this process group, with a record of what its anchor must have seen: for the tests.

    accelerate launch ... -m tests.record_anchor --config FILE

Beside the recipe's output it leaves `record.pt`: the fp32 masters before the first step and after each, and what the
reference makes of a fixed conversation in the end.
"""

import sys
from pathlib import Path

import torch
from transformers import TrainerCallback
from trl import RLOOTrainer

from gemma2_post import rlhf
from gemma2_post.stage.recipe_file import load_yaml
from gemma2_post.training import run as training
from gemma2_post.training.run import fp32_master
from gemma2_post.training.watch import WithAdapter

IDS = [[2, 106, 200, 300, 400, 107, 108, 106, 500, 600]]


class Record(TrainerCallback):
    def __init__(self, trainer: RLOOTrainer, path: Path):
        self.trainer, self.path, self.points = trainer, path, []

    def on_train_begin(self, args, state, control, **_) -> None:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        sharded = self.trainer.is_deepspeed_enabled
        self.points.append(
            {name: fp32_master(each) if sharded else each.detach().clone() for name, each in trained.items()}
        )

    on_step_end = on_train_begin

    def on_train_end(self, args, state, control, **_) -> None:
        reference = self.trainer.ref_model or WithAdapter(self.trainer, "ref")
        ids = torch.tensor(IDS)
        with torch.no_grad():
            logits = reference(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
        if state.is_world_process_zero:
            torch.save({"points": self.points, "logits": logits}, self.path)


if __name__ == "__main__":
    path = Path(load_yaml(Path(sys.argv[sys.argv.index("--config") + 1]))["output_dir"]).with_name("record.pt")
    run = training.run

    def record_and_run(*arguments: object, **further: object) -> None:
        arguments[2].add_callback(Record(arguments[2], path))
        run(*arguments, **further)

    training.run = record_and_run
    rlhf.COMMAND.launch()
