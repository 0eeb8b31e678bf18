"""Training rollouts by vLLM: the same policy samples that is trained, and nothing of it is rounded on the way.

The last tests train in the environment of the vLLM that GEMMA2_POST_VLLM names; see `tests/vllm_environment.py`.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerBase
from trl import RLOOConfig, RLOOTrainer

from gemma2_post import distill, rlhf
from gemma2_post.evaluation.measure import load
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.launcher import Launcher
from gemma2_post.tiny.data import prompts
from gemma2_post.training.rollouts import DIFFERENCE, compare, exact_base
from gemma2_post.weights.anchor import FILE as ANCHOR_FILE
from tests.conftest import TEACHER
from tests.test_vllm import needs_vllm

Recipe = dict[str, object]
CPU = torch.device("cpu")


class Sampler:
    """What vLLM is to TRL's trainer, with transformers in its place: answers with log-probabilities of a model."""

    def __init__(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, temperature: float):
        self.model, self.tokenizer, self.temperature, self.logprobs = model, tokenizer, temperature, None

    def sync_weights(self) -> None:
        """Its model is given to it."""

    def generate(self, prompts: list[list[int]], **_: Any) -> tuple[Any, ...]:
        found, logprobs = [], []
        for ids in prompts:
            tokens = self.model.generate(
                torch.tensor([ids]), max_new_tokens=12, do_sample=True, top_k=0, temperature=self.temperature
            )[0]
            with torch.no_grad():
                logits = self.model(tokens[None]).logits[0, len(ids) - 1 : -1].float() / self.temperature
            answer = tokens[len(ids) :]
            found.append(answer.tolist())
            each = logits.log_softmax(-1).gather(1, answer[:, None])
            logprobs.append(each.tolist() if self.logprobs == 0 else None)
        return prompts, found, logprobs if self.logprobs == 0 else None, None


def trainer_with(sampler: Sampler, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> RLOOTrainer:
    """An `RLOOTrainer` of the teacher that believes to sample with vLLM."""
    args = RLOOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, per_device_eval_batch_size=3,
        num_generations=2, max_completion_length=12, temperature=sampler.temperature, logging_steps=1, use_cpu=True,
        bf16=False, report_to="none", learning_rate=1e-6, save_strategy="no",
    )  # fmt: skip
    trainer = RLOOTrainer(
        model=load(Path(TEACHER), CPU),
        reward_funcs=lambda completions, **_: [float(len(each[0]["content"])) for each in completions],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in prompts("train")[:8]]),
        processing_class=tokenizer,
    )
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, sampler, -1
    compare(trainer)
    return trainer


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_sampler_that_is_the_policy_differs_by_rounding_only(
    temperature: float, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Logged at each step, also at another temperature; the learning rate changes next to nothing."""
    trainer = trainer_with(Sampler(load(Path(TEACHER), CPU), tokenizer, temperature), tokenizer, tmp_path)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if f"{DIFFERENCE}/mean" in entry]
    assert len(logged) == 2
    assert all(entry[f"{DIFFERENCE}/mean"] < entry[f"{DIFFERENCE}/max"] < 1e-3 for entry in logged)


def test_a_sampler_of_another_model_ends_the_run(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = load(Path(TEACHER), CPU)
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    trainer = trainer_with(Sampler(other, tokenizer, 1.0), tokenizer, tmp_path)
    with pytest.raises(
        UserError, match=r"differ from the policy's by \d.* nats per token, more than 0.1, so it samples"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_adapter_that_is_added_and_subtracted_leaves_the_base_as_it_was() -> None:
    """Without `exact_base`, bf16 weights are rounded each time."""
    model = get_peft_model(load(Path(TEACHER), CPU).bfloat16(), LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    before = {name: each.clone() for name, each in model.state_dict().items()}

    def changed() -> list[str]:
        return [name for name, each in model.state_dict().items() if not each.equal(before[name])]

    def add_and_subtract() -> None:
        model.merge_adapter()
        assert changed(), "vLLM is told the sum"
        model.unmerge_adapter()

    for _ in range(3):
        with exact_base(model):
            add_and_subtract()
    assert not changed()
    add_and_subtract()
    assert changed()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vllm_mode": "server"}, "vllm_mode is server, whose weights TRL sends only between GPUs"),
        ({"vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size 2 does not divide 1 processes"),
        ({"top_p": 0.9}, "top_p is 0.9 with use_vllm"),
        ({"repetition_penalty": 1.2}, "repetition_penalty is 1.2 with use_vllm"),
        ({"load_in_4bit": True, "use_peft": True, "dtype": "bfloat16"}, "use_vllm with load_in_4bit"),
    ],
)
def test_what_vllm_cannot_train_with_is_refused(change: Recipe, message: str, rlhf_recipe: Recipe) -> None:
    with pytest.raises(UserError, match=message):
        rlhf.COMMAND.build(rlhf_recipe | {"use_vllm": True} | change, Launcher(use_cpu=True))


# --- with vLLM ---


def trained(command: Any, values: Recipe, tmp_path: Path, killed_at: str = "", launch: Sequence[str] = ()) -> Path:
    """Runs a stage in vLLM's environment; returns its output directory.

    Args:
        killed_at: File of the output at which the stage is killed; empty for a run to the end.
        launch: What starts several processes.
    """
    file, output = tmp_path / "by-vllm.yaml", tmp_path / "by-vllm"
    file.write_text(yaml.safe_dump(values | {"use_vllm": True, "output_dir": str(output)}))
    output = output / "policy-0" if command is rlhf.COMMAND else output
    python = Path(os.environ["GEMMA2_POST_VLLM"]).parent / "python"
    environment = os.environ | {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [str(python), *launch, "-m", command.module, "--config", str(file)],
            stdout=log,
            stderr=log,
            env=environment,
        )
    if killed_at:
        while not (output / killed_at).exists() and process.poll() is None:
            time.sleep(0.1)
        process.kill()
    assert process.wait(timeout=900) == (-signal.SIGKILL if killed_at else 0), (tmp_path / "log").read_text()[-4000:]
    return output


def differences(output: Path) -> list[float]:
    """Mean difference of the log-probabilities at each logged step, in nats per token."""
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [entry[f"{DIFFERENCE}/mean"] for entry in entries if f"{DIFFERENCE}/mean" in entry]


@needs_vllm
@pytest.mark.slow
def test_a_policy_trains_on_what_vllm_samples_and_goes_on_after_a_kill(rlhf_recipe: Recipe, tmp_path: Path) -> None:
    """At a learning rate at which the policy moves: a vLLM that kept the old weights would be refused."""
    values = rlhf_recipe | {"max_steps": 6, "watch_steps": 3, "learning_rate": 1e-3, "logging_steps": 1}
    trained(rlhf.COMMAND, values, tmp_path, killed_at=f"checkpoint-3/{ANCHOR_FILE}")
    output = trained(rlhf.COMMAND, values, tmp_path)
    assert "rlhf goes on" in (tmp_path / "log").read_text()
    assert len(differences(output)) == 6
    assert 0 < max(differences(output)) < 0.05, "vLLM computes in bf16, the trainer in fp32"
    stage = json.loads((output / "stage.json").read_text())
    assert stage["vllm"].startswith("0.")
    assert stage["metrics"]["kl_to_start"] > 0.1


@needs_vllm
@pytest.mark.slow
def test_a_student_learns_with_an_adapter_from_what_vllm_samples(distill_recipe: Recipe, tmp_path: Path) -> None:
    """The student moves, and vLLM with it."""
    adapter = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "dtype": "bfloat16", "learning_rate": 1e-3}
    output = trained(distill.COMMAND, distill_recipe | adapter | {"max_steps": 4, "logging_steps": 1}, tmp_path)
    assert 0 < max(differences(output)) < 0.05
    stage = json.loads((output / "stage.json").read_text())
    assert stage["vllm"].startswith("0.")
    assert stage["metrics"]["kl_student_teacher"] != stage["metrics"]["kl_student_teacher_before"]


@needs_vllm
@pytest.mark.slow
def test_two_processes_under_zero_3_train_on_what_their_vllm_samples(rlhf_recipe: Recipe, tmp_path: Path) -> None:
    """Each process has an engine of its own, to which the sharded weights go after each step."""
    config = yaml.safe_load(Path("accelerate_configs/deepspeed_zero3_cpu.yaml").read_text())
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(config | {"mixed_precision": "no"}))
    launch = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launch += ["--config_file", str(tmp_path / "accelerate.yaml")]
    values = rlhf_recipe | {"max_steps": 3, "watch_steps": 3, "learning_rate": 1e-3, "logging_steps": 1}
    values |= {"per_device_train_batch_size": 4}
    output = trained(rlhf.COMMAND, values, tmp_path, launch=launch)
    assert len(differences(output)) == 3
    assert 0 < max(differences(output)) < 0.05
    stage = json.loads((output / "stage.json").read_text())
    assert stage["num_processes"] == 2 and stage["metrics"]["kl_to_start"] > 0.1
