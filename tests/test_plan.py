"""The planner's work and hours: FLOPs against torch's counter, tokens against a run's log, ranges, what is unknown."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from gemma2_post import cli, sft
from gemma2_post.data.keys import Source
from gemma2_post.data.rows import CONVERSATION
from gemma2_post.models import work
from gemma2_post.models.cost import FP32, Adapted, Compute
from gemma2_post.models.shapes import known_config, num_parameters
from gemma2_post.models.work import Model
from gemma2_post.pipeline import check, loading
from gemma2_post.planning import hours, machines, plan
from gemma2_post.planning.hours import Estimate
from gemma2_post.planning.rows import counter, read, rows_of_job
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.work import Lengths, Pass, Rows, UnknownRows, evenly
from tests.conftest import random_model, write_rows

ROWS, LENGTH = 3, 32
TARGETS = ("q_proj", "v_proj", "down_proj")


def counted(call: object) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("adapts", [False, True])
def test_flops_are_those_that_torch_counts(checkpoints: bool, adapts: bool) -> None:
    model = random_model(300, num_hidden_layers=3, hidden_size=96, sliding_window=1000)
    described = Model(model.config, Compute(FP32), None, Adapted(8, TARGETS, FP32) if adapts else None)
    if adapts:
        model = get_peft_model(model, LoraConfig(r=8, target_modules=list(TARGETS)))
        model.enable_input_require_grads()  # as for gradient checkpointing
    if checkpoints:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    input_ids = torch.randint(4, 300, (ROWS, LENGTH))
    with torch.no_grad():
        forward = counted(lambda: model(input_ids=input_ids, use_cache=False))
    head = work.head_flops(described.config, ROWS * LENGTH)
    assert work.forward_flops(described, ROWS, LENGTH) + head == forward
    both = counted(lambda: model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward())
    expected = forward + work.backward_flops(described, ROWS, LENGTH, checkpoints) + (1 if adapts else 2) * head
    assert expected == pytest.approx(both, rel=0.01)


def test_flops_of_sampling_are_those_that_torch_counts() -> None:
    """5 prompts of 7 tokens in batches of 5, 4 new tokens: transformers does not run the model on the last one."""
    model = random_model(300, sliding_window=1000)
    described = Model(model.config, Compute(FP32))
    prompts = torch.randint(4, 300, (5, 7))
    found = counted(
        lambda: model.generate(prompts, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    )
    first, each = work.sampling(described, 5, 5, Lengths((7,)), Lengths((4,)))
    assert first.flops + 3 * each.flops == pytest.approx(found, rel=0.01)
    assert (first.tokens, each.generated, each.count) == (35, 5, 4)


def test_the_head_is_a_large_part_of_2b() -> None:
    """Of a token's forward pass with its logits, 2 x 2304 x 256000 FLOPs of 2 x 2.6 billion."""
    config = known_config("google/gemma-2-2b")
    norms = num_parameters(config) - work.linear_parameters(config) - config.vocab_size * config.hidden_size
    assert norms == (4 * config.num_hidden_layers + 1) * config.hidden_size
    share = work.head_flops(config, 1) / (work.head_flops(config, 1) + 2 * work.linear_parameters(config))
    assert share == pytest.approx(0.226, abs=0.001)


def test_lengths() -> None:
    """Of 1, 2 and 3, the longest of two is 1 in 1 of 9 draws, 2 in 3, and 3 in 5: (1 + 6 + 15) / 9."""
    found = Lengths((1, 2, 3))
    assert found.mean == found.longest(1) == 2
    assert found.longest(2) == pytest.approx(22 / 9)
    assert found.longest(1000) == pytest.approx(3)
    assert found.up_to(2).sample == (1, 2) and found.up_to(0.5).sample == (0.5,) and found.cut(2).sample == (1, 2, 2)
    assert found.plus(Lengths((10, 20))).sample == (11, 12, 23)
    assert evenly(512).mean == pytest.approx(272) and evenly(512).longest(10_000) == pytest.approx(512)


def of_recipe(pipeline: str, stage: str, **values: object) -> list[Pass]:
    jobs = check.check(loading.load_pipeline(Path(pipeline), overrides={stage: values} if values else {}), until=stage)
    job = next(each for each in jobs if each.command.name == stage)
    return job.command.work(job.checked, rows_of_job(job, counter(jobs), None))


def test_rows_of_a_mixture_and_of_the_hub(tmp_path: Path) -> None:
    """Weights 3 and 1 use no row twice: all 100 rows of one source, and 33 of the other's 50."""
    paths = write_rows(tmp_path / "a.jsonl", 100), write_rows(tmp_path / "b.jsonl", 50)
    both = [Source(path=str(path), weight=weight) for path, weight in zip(paths, (3, 1), strict=True)]
    known, first = read(both, CONVERSATION, [])
    assert known == 133 and len(first) == 150
    assert read([Source(path=str(path)) for path in paths], CONVERSATION, [])[0] == 150
    assert read([*both, Source(path="someone/chats")], CONVERSATION, []) == (None, first)
    assert read([], CONVERSATION, []) == (None, [])


@pytest.mark.slow
def test_tokens_of_a_run_are_those_that_it_logs(tmp_path: Path) -> None:
    """All demonstrations once; the rows whose lengths are counted are the first ones."""
    values = {"num_samples": 0, "max_steps": 3, "output_dir": str(tmp_path / "sft"), "save_strategy": "no"}
    trained = of_recipe("recipes/tiny/pipeline.yaml", "sft")[0]
    stage, recipe = sft.COMMAND.parse(
        ["--config", "recipes/tiny/sft.yaml", *(f"--{key}={value}" for key, value in values.items())]
    )
    sft.COMMAND.run(stage, recipe)
    log = [json.loads(line) for line in (tmp_path / "sft" / "log.jsonl").read_text().splitlines()]
    tokens = next(entry["num_tokens"] for entry in reversed(log) if "num_tokens" in entry)
    assert 3 * trained.tokens == pytest.approx(tokens, rel=0.1)
    assert trained.count == 188  # 6000 rows in batches of 32


def test_adapters_processes_and_epochs_divide_the_work() -> None:
    path = "recipes/gemma-2-2b/pipeline.yaml"
    rows = Rows(known=1600, known_held_out=16)
    *_, job = check.check(loading.load_pipeline(Path(path)), until="sft")
    found = {}
    for processes in (1, 2):
        changed = plan.Change({}, {"num_processes": processes}).apply(job)
        found[processes] = job.command.work(changed.checked, rows)[0]
        assert processes * found[processes].count * found[processes].tokens == pytest.approx(1600 * evenly(1024).mean)
    assert found[1].count == 2 * found[2].count and found[1].flops == found[2].flops
    with pytest.raises(UnknownRows):
        job.command.work(job.checked, Rows())


def estimates(pipeline: str, gpu: str = "H100", **overrides: dict[str, object]) -> list[Estimate]:
    rows = plan.plan(check.check(loading.load_pipeline(Path(pipeline), overrides=overrides)))
    return hours.estimate([(row.job, row.num_runs) for row in rows], gpu)


def test_hours_have_an_order_and_a_sum() -> None:
    known: dict[str, dict[str, object]] = {"sft": {"max_steps": 800}, "reward": {"max_steps": 1000}}
    found = {gpu: estimates("recipes/gemma-2-2b/pipeline.yaml", gpu, **known) for gpu in machines.GPUS}
    for each in found["H100"]:
        best, worst = each.seconds
        assert 0 < best < worst < 20 * best
    totals = {gpu: sum(each.device_seconds for each in of_gpu) for gpu, of_gpu in found.items()}
    assert totals["H200"] < totals["H100"] < totals["A100"] < totals["RTX 4090"] < totals["L4"]
    lines = hours.summary(found["H100"])
    assert "GPU-hours on H100; rlhf takes most" in lines[0] and "989 TFLOP/s" in lines[1]


def test_four_policies_take_four_times_as_long_as_one() -> None:
    one, four = (
        next(each for each in hours.estimate([(job, runs)], "H100"))
        for job in check.check(loading.load_pipeline(Path("recipes/gemma-2-2b/pipeline.yaml")), until="rlhf")[-1:]
        for runs in (1, 4)
    )
    assert four.seconds == pytest.approx([4 * each for each in one.seconds])
    assert four.tokens == 4 * one.tokens and four.flops == 4 * one.flops and four.generated == 4 * one.generated


def test_jbond_samples_as_many_answers_as_rloo_and_reads_a_third_of_them_again() -> None:
    (job,) = check.check(loading.load_pipeline(Path("recipes/tiny/pipeline.yaml")), until="rlhf")[-1:]
    changes = {"global_batch_size": 48, "per_device_train_batch_size": 48, "watch_steps": 10**6}
    rloo, jbond = (
        hours.estimate([(plan.Change(changes | {"algorithm": name, "num_generations": n}).apply(job), 1)], "H100")[0]
        for name, n in (("rloo", 4), ("jbond", 3))
    )
    assert jbond.generated == pytest.approx(rloo.generated, rel=0.02)
    # RLOO reads all answers three times, once of that with a gradient; J-BOND reads two thirds of them only then.
    assert 0.6 < jbond.tokens / rloo.tokens < 0.9


def test_what_is_unknown_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    plan.show(check.check(loading.load_pipeline(Path("recipes/gemma-2-2b/pipeline.yaml"))), Console(width=140))
    said = capsys.readouterr().out
    assert "in all without sft, reward: " in said and "--set sft.max_steps=N --set reward.max_steps=N" in said
    assert "assumed, not measured: 20% to 50% of H100's" in said


def test_a_selftest_gives_the_speed_of_its_slowest_gpu(tmp_path: Path) -> None:
    """A machine as fast as an H100 in the middle of its range takes that long."""
    fast, slow = (vars(speed) for speed in machines.speeds_of("H100"))
    numbers = {name: (fast[name] * slow[name]) ** 0.5 for name in fast} | {"training_tokens_per_second": 1.0}
    faster = numbers | {"flops": 2 * numbers["flops"]}
    parts = [("numerics of cuda:0", {"error": 0.1}), ("speed of cuda:0", faster), ("speed of cuda:1", numbers)]
    file = tmp_path / "selftest.json"
    file.write_text(json.dumps({"results": [{"part": part, "numbers": each} for part, each in parts]}))
    machines.check_gpu(str(file))
    known: dict[str, dict[str, object]] = {"sft": {"max_steps": 800}, "reward": {"max_steps": 1000}}
    path = "recipes/gemma-2-2b/pipeline.yaml"
    pairs = zip(estimates(path, "H100", **known), estimates(path, str(file), **known), strict=True)
    for by_name, by_file in [pair for pair in pairs if pair[0].passes]:
        best, worst = by_file.seconds
        assert by_name.seconds[0] < best < worst < by_name.seconds[1]
        starts = [by_file.num_runs * seconds for seconds in machines.START_SECONDS]
        assert worst - starts[1] == pytest.approx(1.3**2 * (best - starts[0]))
    assert "has the speed that a selftest measured" in hours.assumptions(True, False, str(file))[0]
    file.write_text(json.dumps({"results": [{"part": "speed of cpu", "numbers": numbers}]}))
    machines.speed_of_selftest.cache_clear()
    with pytest.raises(UserError, match="it has no speed of a GPU"):
        machines.check_gpu(str(file))


def test_a_gpu_without_an_entry_is_refused() -> None:
    with pytest.raises(UserError, match=r"--gpu V100: its speed is not known; name one of H100, H200, A100"):
        cli.plan(Path("recipes/tiny/pipeline.yaml"), gpu="V100")


def test_this_processor_is_measured() -> None:
    """A step of training a small model takes as long as is planned for it, within a factor of three."""
    model = random_model(300, hidden_size=128, intermediate_size=256)
    described = Model(model.config, Compute(FP32, on_cpu=True))
    step = work.training(described, 16, Lengths((64,)), work.Loss(), checkpoints=False)
    best, worst = machines.speeds_of_processor(step)
    rows = torch.randint(4, 300, (16, 64))
    measured = machines._seconds(lambda: model.model(input_ids=rows).last_hidden_state.sum().backward())
    assert best.seconds(step) < worst.seconds(step)
    assert 1 / 3 < (best.seconds(step) * worst.seconds(step)) ** 0.5 / measured < 3


@pytest.mark.parametrize(
    ("range_", "words"), [((30, 60), "30 to 60 s"), ((90, 240), "1.5 to 4 min"), ((3600, 9000), "1 to 2.5 h")]
)
def test_durations(range_: tuple[float, float], words: str) -> None:
    assert hours.duration(*range_) == words


def test_every_stage_of_every_shipped_pipeline_states_its_work() -> None:
    for path in sorted(Path("recipes").glob("*/pipeline.yaml")):
        for job in check.check(loading.load_pipeline(path)):
            rows = Rows(known=10_000, known_held_out=100)
            passes = job.command.work(job.checked, rows)
            only_merges = job.command.name == "warp" and job.checked.recipe.release is None
            assert bool(passes) != (only_merges or job.command.name == "curate")
            for each in passes:
                numbers = (each.count, each.tokens, each.generated, each.flops, each.num_bytes, each.layers)
                assert all(0 <= number < float("inf") for number in numbers)
