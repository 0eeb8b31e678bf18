"""Distillation: the loss is its formula, the stage trains on the student's own ended answers, mistakes are refused."""

import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2ForCausalLM, PreTrainedTokenizerBase, TrainerControl, TrainerState
from trl import DistillationConfig, DistillationTrainer
from trl.import_utils import is_vllm_available

from gemma2_post import distill
from gemma2_post.data.keys import Source
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError, located
from gemma2_post.stage.launcher import Launcher
from gemma2_post.tiny.data import prompts
from gemma2_post.training import run as training
from gemma2_post.training.watch import StopIfAnswersAreCut
from tests.conftest import BASE, TEACHER, load_prompts, losses, random_model
from tests.test_bad_input import MODEL, USER, make_adapter, with_rows, with_values

Run = Callable[[dict[str, object]], Path]
Recipe = dict[str, object]
Change = Callable[[Recipe, Path], Recipe]

GREEDY = {"generation_kwargs": {"do_sample": False}}
QLORA = {"use_peft": True, "load_in_4bit": True, "dtype": "bfloat16", "lora_r": 4, "lora_alpha": 8}

# --- the loss ---

PROMPTS = [list(range(200, 212)), [300, 301], [400, 401, 402, 403, 404]]
ANSWERS = [[500, 501, 107], [502], list(range(510, 521))]


def far_apart(tokenizer: PreTrainedTokenizerBase) -> tuple[Gemma2ForCausalLM, Gemma2ForCausalLM]:
    """Student and teacher with weights so large that both soft-caps bite."""
    models = tuple(random_model(len(tokenizer), size, hidden_size=size, initializer_range=0.6) for size in (32, 48))
    for model in models:
        for norm in (model.model.norm, *(layer.post_attention_layernorm for layer in model.model.layers)):
            torch.nn.init.constant_(norm.weight, 9.0)
    return models


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask; what is padded is filled with a token that would matter if it were seen."""
    width = max(map(len, rows))
    pairs = [([777] * (width - len(row)), [0] * (width - len(row)), row, [1] * len(row)) for row in rows]
    if side == "left":
        return tuple(torch.tensor([pair[i] + pair[i + 2] for pair in pairs]) for i in range(2))
    return tuple(torch.tensor([pair[i + 2] + pair[i] for pair in pairs]) for i in range(2))


def trained_loss(
    student: Gemma2ForCausalLM, teacher: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerBase, **values: object
) -> torch.Tensor:
    """TRL's loss of the answers above, as its trainer computes it."""
    rows = Dataset.from_dict({"prompt": [[USER]]})
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "activation_checkpointing": False}
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(**settings, **values),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    prompt_ids, prompt_mask = padded(PROMPTS, "left")
    completion_ids, completion_mask = padded(ANSWERS, "right")
    inputs = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask}
    inputs |= {"completion_ids": completion_ids, "completion_mask": completion_mask}
    return trainer.compute_loss(trainer.model, inputs)


def answer_logits(model: Gemma2ForCausalLM, final_cap: float = 30.0) -> torch.Tensor:
    """In front of each token of each answer, one row at a time, without padding: (tokens, vocabulary)."""
    rows = []
    for prompt_ids, answer_ids in zip(PROMPTS, ANSWERS, strict=True):
        hidden = model.model(input_ids=torch.tensor([prompt_ids + answer_ids])).last_hidden_state
        logits = hidden[0, len(prompt_ids) - 1 : -1] @ model.model.embed_tokens.weight.T
        rows.append(final_cap * torch.tanh(logits / final_cap))
    return torch.cat(rows)


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def expected_loss(
    student: Gemma2ForCausalLM, teacher: Gemma2ForCausalLM, beta: float, temperature: float
) -> torch.Tensor:
    with torch.no_grad():
        teacher_log_p = (answer_logits(teacher) / temperature).log_softmax(-1)
    student_log_p = (answer_logits(student) / temperature).log_softmax(-1)
    if beta == 0:
        return kl(teacher_log_p, student_log_p).mean()
    if beta == 1:
        return kl(student_log_p, teacher_log_p).mean()
    mixed = (beta * teacher_log_p.exp() + (1 - beta) * student_log_p.exp()).log()
    return (beta * kl(teacher_log_p, mixed) + (1 - beta) * kl(student_log_p, mixed)).mean()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_loss_and_its_gradient_are_the_divergence_of_the_soft_capped_distributions(
    beta: float, temperature: float, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    student, teacher = far_apart(tokenizer)
    reference = copy.deepcopy(student).double()
    expected = expected_loss(reference, copy.deepcopy(teacher).double(), beta, temperature)
    expected.backward()
    loss = trained_loss(
        student, teacher, tokenizer, beta=beta, temperature=temperature, output_dir=str(tmp_path / "out")
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in student.named_parameters():
        error = (parameter.grad - wanted[name].grad).norm() / wanted[name].grad.norm()
        assert error < 1e-4, f"{name}: {error}"


def test_both_soft_caps_matter_in_the_models_of_the_test_above(tokenizer: PreTrainedTokenizerBase) -> None:
    models = far_apart(tokenizer)
    with torch.no_grad():
        capped = [answer_logits(model) for model in models]
        uncapped = [answer_logits(model, final_cap=1e9) for model in models]
        first, second = (kl(*(part.log_softmax(-1) for part in logits)).mean() for logits in (capped, uncapped))
        assert second > 2 * first
        for model, logits in zip(models, capped, strict=True):
            for layer in model.model.layers:
                assert layer.self_attn.attn_logit_softcapping == 50
                layer.self_attn.attn_logit_softcapping = None
            assert (answer_logits(model) - logits).abs().mean() > 0.3


def test_between_the_two_kls_the_loss_shrinks_with_its_weight(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The generalised JSD is beta KL(teacher||student) near 0 and (1 - beta) KL(student||teacher) near 1.

    So beta: 0.001 is no forward KL with a little of something else: its gradient is a thousandth as large.
    """
    student = random_model(len(tokenizer), seed=1, initializer_range=0.05)
    teacher = random_model(len(tokenizer), seed=2, initializer_range=0.15)

    def loss(beta: float) -> float:
        return trained_loss(student, teacher, tokenizer, beta=beta, output_dir=str(tmp_path / "out")).item()

    forward, reverse = loss(0.0), loss(1.0)
    assert forward > 1.1 * reverse
    assert loss(1e-3) / 1e-3 == pytest.approx(forward, rel=0.03)
    assert loss(1 - 1e-3) / 1e-3 == pytest.approx(reverse, rel=0.03)


# --- the stage ---


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[DistillationTrainer]:
    """The trainers of the runs that follow."""
    seen, run = [], training.run

    def run_and_remember(*arguments: object) -> None:
        seen.append(arguments[2])
        run(*arguments)

    monkeypatch.setattr(training, "run", run_and_remember)
    return seen


def metrics_of(output: Path) -> dict[str, float]:
    return json.loads((output / "metrics.json").read_text())


def same_weights(first: Path, second: Path) -> bool:
    return (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_full_fine_tuning_comes_nearer_to_the_teacher_and_writes_every_measure(
    run_distill: Run, distill_recipe: Recipe
) -> None:
    output = run_distill(distill_recipe | {"learning_rate": 1e-3, "max_steps": 3})
    metrics = metrics_of(output)
    measured = ["kl_student_teacher", "kl_student_teacher_per_token", "kl_teacher_student"]
    measured += ["kl_teacher_student_per_token", "student_nll", "stop_rate", "mean_tokens"]
    assert metrics.keys() == {
        *measured,
        *(f"{name}_before" for name in measured),
        "tokens_per_second",
        "peak_memory_gb",
    }
    for name in ("kl_student_teacher", "kl_teacher_student"):
        # Of whole answers it grows at first: this teacher never ends, so its student's answers become longer.
        assert metrics[f"{name}_per_token"] < 0.95 * metrics[f"{name}_per_token_before"]
        for when in ("", "_before"):  # the stop token is one of the tokens here, not so in mean_tokens
            num_tokens = metrics[f"mean_tokens{when}"] + metrics[f"stop_rate{when}"]
            assert metrics[f"{name}{when}"] == pytest.approx(metrics[f"{name}_per_token{when}"] * num_tokens)

    before, after = load_file(f"{TEACHER}/model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys() and "lm_head.weight" not in after
    changed = sum((after[name] != before[name].float()).sum().item() for name in after if "embed" not in name)
    assert changed > 0.9 * sum(after[name].numel() for name in after if "embed" not in name)
    assert json.loads((output / "stage.json").read_text())["metrics"] == metrics
    _, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == [1, 107]


@pytest.mark.slow
def test_the_teachers_grade_is_measured_and_the_closed_part_of_the_gap(
    run_distill: Run, distill_recipe: Recipe
) -> None:
    changes = {"graders": ["gemma2_post.tiny.gold:gold"], "group_by": "skill", "learning_rate": 3e-3, "max_steps": 3}
    metrics = metrics_of(run_distill(distill_recipe | changes))
    before, after, teacher = (metrics[name] for name in ("gold_before", "gold", "teacher_gold"))
    assert len({before, after, teacher}) == 3
    assert metrics["gold_gap_closed"] == pytest.approx((after - before) / (teacher - before))
    assert {"teacher_stop_rate", "teacher_mean_tokens", "gold/bigger", "gold/bigger_before"} <= metrics.keys()


def test_without_samples_nothing_is_measured(run_distill: Run, distill_recipe: Recipe) -> None:
    changes = {"graders": ["gemma2_post.tiny.gold:gold"], "num_samples": 0, "max_steps": 1}
    assert metrics_of(run_distill(distill_recipe | changes)).keys() == {"tokens_per_second", "peak_memory_gb"}


def test_a_student_that_is_its_teacher_is_at_distance_zero(run_distill: Run, distill_recipe: Recipe) -> None:
    output = run_distill(distill_recipe | {"teacher_model_name_or_path": TEACHER, "max_steps": 1})
    metrics = metrics_of(output)
    assert losses(output) == pytest.approx([0.0], abs=1e-6)
    assert metrics["kl_student_teacher_before"] == pytest.approx(0, abs=1e-5)
    assert metrics["kl_teacher_student_before"] == pytest.approx(0, abs=1e-5)
    assert metrics["student_nll_before"] > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("teacher_load_in_4bit", [True, False])
def test_qlora_on_the_teachers_own_weights_is_at_distance_zero_if_the_teacher_is_in_4_bit_too(
    teacher_load_in_4bit: bool, run_distill: Run, distill_recipe: Recipe
) -> None:
    changes = {"teacher_model_name_or_path": TEACHER, "teacher_dtype": "bfloat16"}
    output = run_distill(distill_recipe | QLORA | changes | {"teacher_load_in_4bit": teacher_load_in_4bit})
    distance = metrics_of(output)["kl_student_teacher_per_token_before"]
    assert distance == pytest.approx(0, abs=1e-6) if teacher_load_in_4bit else distance > 1e-5
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    _, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_rollouts_end_with_either_stop_token(
    run_distill: Run, distill_recipe: Recipe, trainers: list[DistillationTrainer]
) -> None:
    run_distill(distill_recipe | {"num_samples": 0, "max_steps": 1})
    (trainer,) = trainers
    assert sorted(trainer.eos_token_ids) == [1, 107] == sorted(trainer.generation_config.eos_token_id)
    (rollouts,) = trainer._buffered_inputs
    num_tokens = rollouts["completion_mask"].sum(1)
    assert len(num_tokens) == 8 and num_tokens.min() < num_tokens.max() < 16
    for ids, length in zip(rollouts["completion_ids"].tolist(), num_tokens.tolist(), strict=True):
        assert ids.index(107) == length - 1 and set(ids[length:]) <= {0}


def test_dropout_is_off(run_distill: Run, distill_recipe: Recipe, trainers: list[DistillationTrainer]) -> None:
    run_distill(distill_recipe | QLORA | {"lora_dropout": 0.5, "num_samples": 0, "learning_rate": 1e-2})
    (trainer,) = trainers
    (rollouts,) = trainer._buffered_inputs
    assert trainer.model.training and trainer.model.peft_config["default"].lora_dropout == 0.5
    first, second = (trainer.compute_loss(trainer.model, rollouts).item() for _ in range(2))
    assert first == second
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert trainer.compute_loss(trainer.model, rollouts).item() != first


def test_a_prompt_is_the_same_as_messages_as_text_and_in_a_conversation(tmp_path: Path) -> None:
    system, again = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "And now?"}
    chats = [[USER], [USER, MODEL, again], [system, USER]]
    formats = {
        "prompts": [{"prompt": chat} for chat in chats],
        "conversations": [{"messages": [*chat, MODEL]} for chat in chats],
        "conversations that end with the user": [{"messages": chat} for chat in chats],
        "ShareGPT": [
            {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in [*chat, MODEL]]}
            for chat in chats
        ],
        "preferences": [{"prompt": chat, "chosen": [MODEL], "rejected": [MODEL]} for chat in chats],
    }
    folded = {"role": "user", "content": "Be kind.\n\nHi"}
    for name, rows in formats.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        loaded = load_prompts([Source(str(tmp_path / f"{name}.jsonl"))], 0.0, seed=0)
        assert loaded.column_names == ["prompt"] and list(loaded["prompt"]) == [*chats[:2], [folded]], name
    (tmp_path / "texts.jsonl").write_text(json.dumps({"prompt": "Hi"}) + "\n")
    assert load_prompts([Source(str(tmp_path / "texts.jsonl"))], 0.0, 0)["prompt"][0] == [USER]


def test_prompts_longer_than_allowed_are_dropped(
    run_distill: Run, distill_recipe: Recipe, trainers: list[DistillationTrainer], tokenizer: PreTrainedTokenizerBase
) -> None:
    chats = [row["prompt"] for row in prompts("train")[:24]]
    lengths = [len(ids) for ids in tokenizer.apply_chat_template(chats, add_generation_prompt=True)["input_ids"]]
    longest = sorted(lengths)[15]
    kept = [chat for chat, length in zip(chats, lengths, strict=True) if length <= longest]
    assert 16 <= len(kept) < 24
    changes = {"max_prompt_length": longest, "max_too_long_share": 1.0, "num_samples": 0, "max_steps": 1}
    run_distill(distill_recipe | changes)
    assert list(trainers[0].train_dataset["prompt"]) == kept


@pytest.mark.slow
@pytest.mark.parametrize("method", [{}, QLORA], ids=["full", "qlora"])
def test_resumed_equals_uninterrupted(
    method: Recipe, run_distill: Run, distill_recipe: Recipe, tmp_path: Path
) -> None:
    """Also in what the student samples, and with accumulation, in which the rollouts of a step are kept."""
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    values = distill_recipe | changes | {"per_device_train_batch_size": 4} | method
    whole = run_distill(values)
    interrupted = tmp_path / "interrupted"
    interrupted.mkdir()
    # What a killed run leaves behind: its claim, what it measured before the first step, and a checkpoint.
    (whole / "checkpoint-2").rename(interrupted / "checkpoint-2")
    (whole / "before.json").rename(interrupted / "before.json")
    stage = json.loads((whole / "stage.json").read_text())
    contract.begin(interrupted, stage["fingerprint"])

    resumed = run_distill(values | {"output_dir": str(interrupted)})
    assert len(set(losses(whole))) == 4 and losses(resumed) == losses(whole)
    assert same_weights(whole, resumed)
    assert json.loads((resumed / "stage.json").read_text())["output"] == stage["output"]


@pytest.mark.slow
def test_eight_prompts_at_once_are_two_prompts_four_times(
    run_distill: Run, distill_recipe: Recipe, tmp_path: Path
) -> None:
    together = run_distill(distill_recipe | GREEDY)
    changes = {"per_device_train_batch_size": 2, "output_dir": str(tmp_path / "apart")}
    apart = run_distill(distill_recipe | GREEDY | changes)
    assert losses(apart) == pytest.approx(losses(together), rel=1e-5)
    first, second = (load_file(output / "model.safetensors") for output in (together, apart))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=2e-5, rtol=0)  # a fifth of one Adam step of 1e-4


# --- answers that never end ---


def test_a_student_that_does_not_stop_is_stopped_and_leaves_no_finished_output(
    run_distill: Run, distill_recipe: Recipe
) -> None:
    changes = {"model_name_or_path": BASE, "teacher_model_name_or_path": TEACHER, "max_steps": 3}
    with pytest.raises(UserError, match=r"100% of the student's answers in the first 3 steps were cut at max_comple"):
        run_distill(distill_recipe | changes | {"num_samples": 0, "max_completion_length": 8, "logging_steps": 2})
    output = Path(distill_recipe["output_dir"])
    assert not (output / "stage.json").exists() and not (output / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("last_share", "max_steps", "stops_at"), [(0.7, 100, 20), (0.6, 100, None), (0.7, 20, 20), (1.0, 10, 10)]
)
def test_the_share_of_cut_answers_is_that_of_the_first_twenty_steps_however_often_they_are_logged(
    last_share: float, max_steps: int, stops_at: int | None
) -> None:
    """Logged every seven steps: (14 + 6 x 0.7) / 20 = 91 %, (14 + 6 x 0.6) / 20 = 88 %; steps after 20 are all cut.

    TRL logs the mean over the steps since the last log; the end of the training is logged, too.
    """
    callback = StopIfAnswersAreCut(16)
    state, control = TrainerState(max_steps=max_steps), TrainerControl()
    found = None
    for step in range(1, max_steps + 1):
        state.global_step, control.should_log = step, step % 7 == 0 or step == max_steps
        callback.on_step_end(None, state, control)
        if control.should_log:
            share = last_share if 14 < step <= 20 else 1.0
            try:
                callback.on_log(None, state, control, {"completions/clipped_ratio": share})
            except UserError:
                found = step
                break
    assert found == stops_at


# --- mistakes ---


def with_teacher(change_teacher: Callable[[Path], None]) -> Change:
    def change(recipe: Recipe, folder: Path) -> Recipe:
        broken = shutil.copytree(TEACHER, folder / "broken")
        change_teacher(broken)
        return recipe | {"teacher_model_name_or_path": str(broken)}

    return change


def change_json(file: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def swap_two_tokens(directory: Path) -> None:
    def swap(content: dict) -> None:
        vocabulary = content["model"]["vocab"]
        tokens = {token_id: token for token, token_id in vocabulary.items()}
        vocabulary[tokens[900]], vocabulary[tokens[700]] = 700, 900

    change_json(directory / "tokenizer.json", swap)


def add_a_token(directory: Path) -> None:
    added = {"id": 1024, "content": "<extra>", "special": True, "normalized": False}
    added |= {"lstrip": False, "rstrip": False, "single_word": False}
    change_json(directory / "tokenizer.json", lambda content: content["added_tokens"].append(added))
    change_json(directory / "config.json", lambda content: content.update(vocab_size=1025))
    tensors = load_file(directory / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([embeddings, embeddings[:1]])
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def with_one_long_prompt(recipe: Recipe, folder: Path) -> Recipe:
    rows = [{"prompt": [USER], "skill": "sum", "answer": "1"}] * 9
    rows.append({"prompt": [{"role": "user", "content": "plus " * 50}], "skill": "sum", "answer": "1"})
    return with_rows(rows)(recipe, folder) | {"max_prompt_length": 40}


NO_TURN = "row 0: there is no user turn to answer"
BAD: dict[str, tuple[Change, str]] = {
    "no teacher": (with_values(teacher_model_name_or_path=None), "teacher_model_name_or_path is missing"),
    "a teacher that is nowhere": (with_values(teacher_model_name_or_path="./nowhere"), "there is no folder ./nowhere"),
    "an adapter as teacher": (with_teacher(make_adapter), "broken is an adapter, not a model"),
    "an unfinished stage as teacher": (
        with_teacher(lambda directory: (directory / "begun.json").write_text("{}")),
        "broken is not finished; run the stage that makes it",
    ),
    "a teacher with other ids": (with_teacher(swap_two_tokens), f"id 700 is 'hur' to the student {TEACHER} and "),
    "a teacher with a larger vocabulary": (
        with_teacher(add_a_token),
        f"id 1024 is None to the student {TEACHER} and '<extra>' to the teacher",
    ),
    "a teacher without its tokenizer": (
        with_teacher(lambda directory: (directory / "tokenizer.json").unlink()),
        "broken has no tokenizer.json",
    ),
    "a teacher quantised in fp32": (with_values(teacher_load_in_4bit=True), "the teacher: dtype is float32 with quan"),
    "all prompts too long": (
        with_values(max_prompt_length=3),
        "all 24 prompts are longer than max_prompt_length 3 tokens; raise max_prompt_length",
    ),
    "some prompts too long": (
        with_one_long_prompt,
        "1 of 10 prompts are longer than max_prompt_length 40 tokens; raise max_prompt_length",
    ),
    "answers longer than the model": (
        with_values(max_completion_length=512),
        "max_completion_length 512 leaves 0 of the model's 512 positions for a prompt",
    ),
    "prompts and answers longer than the model": (
        with_values(max_prompt_length=497),
        "max_completion_length 16 leaves 496 of the model's 512 positions for a prompt of max_prompt_length 497",
    ),
    "no length of answers": (with_values(max_completion_length=None), "max_completion_length"),
    "fewer prompts than a step takes": (
        with_values(global_batch_size=32, per_device_train_batch_size=32),
        "global_batch_size 32",
    ),
    "no prompts": (with_rows(""), "bad.jsonl: the file is empty"),
    "a prompt that ends with the model": (
        with_rows([{"prompt": [USER, MODEL], "skill": "sum", "answer": "1"}]),
        "row 0: the last turn is the model's; it must be the user's",
    ),
    "a conversation of the model alone": (with_rows([{"messages": [MODEL], "skill": "sum", "answer": "1"}]), NO_TURN),
    "a system message alone": (
        with_rows([{"prompt": [{"role": "system", "content": "Be kind."}], "skill": "sum", "answer": "1"}]),
        "row 0: no user turn follows the system message",
    ),
    "a column that is not there": (with_values(columns=["skil"]), "columns: no source has skil"),
    "beta": (with_values(beta=1.5), "beta is 1.5; write 0 or more, at most 1"),
    "vLLM": (with_values(use_vllm=True), "use_vllm is true, but vLLM is not installed; pip"),
    "TRL's own keys for the teacher": (
        with_values(teacher_model_init_kwargs={"dtype": "bfloat16"}),
        "teacher_model_init_kwargs must not be set: use teacher_dtype",
    ),
    "dropout": (with_values(disable_dropout=False), "disable_dropout must not be set: dropout is always off"),
    "the chat format": (with_values(chat_template_kwargs={}), "chat_template_kwargs must not be set"),
    "tools": (with_values(max_tool_calling_iterations=1), "max_tool_calling_iterations must not be set"),
    "columns": (with_values(remove_unused_columns=True), "remove_unused_columns must not be set"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_a_mistake_is_one_sentence_with_status_2_and_touches_nothing(
    change: Change,
    message: str,
    distill_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "vLLM" in message and is_vllm_available():
        pytest.skip("vLLM is installed")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(change(distill_recipe, tmp_path)))
    monkeypatch.setattr(sys, "argv", ["distill", "--config", str(file)])
    with pytest.raises(SystemExit) as stopped:
        distill.COMMAND.launch()
    assert stopped.value.code == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in sentence and str(file) in sentence
    assert not Path(distill_recipe["output_dir"]).exists()


@pytest.mark.parametrize("key", ["teacher_load_in_4bit", "teacher_load_in_8bit"])
def test_a_quantised_teacher_is_refused_under_zero_3_and_only_there(key: str, distill_recipe: Recipe) -> None:
    values = distill_recipe | {key: True, "teacher_dtype": "bfloat16"}
    distill.COMMAND.build(values, Launcher(zero_stage=2))
    with (
        pytest.raises(UserError, match=r"^recipe: a quantized teacher cannot be sharded by ZeRO-3"),
        located("recipe"),
    ):
        distill.COMMAND.build(values, Launcher(zero_stage=3, saves_16bit_model=True))


# --- several teachers ---


@pytest.mark.slow
def test_teachers_take_the_micro_batches_in_turn(
    run_distill: Callable[[dict[str, object]], Path],
    distill_recipe: dict[str, object],
    model_dir: Path,
    tmp_path: Path,
) -> None:
    """A step is a sum over its micro-batches, so swapping the teachers shares out the sum of both alone."""
    other = str(shutil.copytree(model_dir, tmp_path / "other"))
    recipe = {key: value for key, value in distill_recipe.items() if key != "teacher_model_name_or_path"}
    recipe |= {"max_steps": 1, "per_device_train_batch_size": 4, "num_samples": 2, "max_completion_length": 6}

    def loss(*teachers: str) -> float:
        named = {"teachers": list(teachers)} if len(teachers) > 1 else {"teacher_model_name_or_path": teachers[0]}
        output = run_distill(
            recipe | named | {"output_dir": str(tmp_path / "out" / "-".join(Path(t).name for t in teachers))}
        )
        return losses(output)[0]

    each, swapped = [loss(BASE), loss(other)], [loss(BASE, other), loss(other, BASE)]
    assert abs(swapped[0] - swapped[1]) > 1e-3 and sum(swapped) == pytest.approx(sum(each), rel=1e-4)
    both, alone = (metrics_of(tmp_path / "out" / name) for name in ("base-other", "other"))
    assert both["kl_student_teacher/other_before"] == pytest.approx(alone["kl_student_teacher_before"], rel=1e-4)
    of_each = [both[f"kl_student_teacher/{name}"] for name in ("base", "other")]
    assert both["kl_student_teacher"] == pytest.approx(sum(of_each) / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"teacher_model_name_or_path": None, "teachers": [BASE, TEACHER], "teacher_model_revision": "v2"},
            "teacher_model_revision is for one teacher; remove it",
        ),
        ({"teachers": [BASE, TEACHER]}, "teacher_model_name_or_path and teachers both name teachers; remove one"),
        ({"teacher_model_name_or_path": None}, "teacher_model_name_or_path is missing"),
        (
            {"teacher_model_name_or_path": None, "teachers": [BASE, TEACHER], "eval_strategy": "epoch"},
            "eval_strategy would evaluate with the teacher whose turn it is; remove it",
        ),
        ({"teacher_model_name_or_path": None, "teachers": []}, "teachers is empty; write one or more"),
        (
            {"teacher_model_name_or_path": None, "teachers": ["a/x", "b/x"]},
            r"teachers: two folders have the same name",
        ),
    ],
)
def test_teachers_that_cannot_be_told_apart_are_refused(
    change: dict[str, object], message: str, distill_recipe: dict[str, object]
) -> None:
    with pytest.raises(UserError, match=message):
        distill.COMMAND.build(distill_recipe | change)
