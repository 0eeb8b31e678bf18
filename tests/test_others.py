"""Models that are not of the chain answer beside it: behind an endpoint, or of another family."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gemma2_post import evaluate
from gemma2_post.stage.errors import UserError
from tests.conftest import TEACHER, run_stage
from tests.test_evaluate import evaluate_recipe
from tests.test_protocols import mt_bench_dir
from tests.test_synthesize import completion, serve

__all__ = ["evaluate_recipe", "mt_bench_dir", "serve"]  # fixtures

Recipe = dict[str, object]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def llama_dir(tmp_path: Path) -> Path:
    """A random Llama with a tokenizer and a chat format of its own."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>", "<user>", "<assistant>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    trained.train_from_iterator(["What is the sum of three and five?"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.slow
def test_other_models_are_rewarded_judged_and_counted_beside_the_chain(
    evaluate_recipe: Recipe, llama_dir: Path, mt_bench_dir: Path, tmp_path: Path, serve: Callable
) -> None:
    """What cannot be measured of them is left out; a second run asks nothing again, and neither does a killed one."""
    asked: list[tuple[str, str]] = []

    def reply(request: dict) -> tuple[int, str]:
        text = request["messages"][-1]["content"]
        asked.append((request["model"], json.dumps(request["messages"])))
        if request["model"] == "judge":
            return completion("[[7]]" if "answer A" not in text else "[[tie]]")
        if len(asked) == 8:
            return 500, "{}"  # it is asked again by the client itself
        if "?" not in text:
            return 400, '{"error": {"message": "no"}}'
        return completion("It is 8.", "length" if "3 plus" in text else "stop")

    url = serve(reply).url
    values = evaluate_recipe | {
        "models": evaluate_recipe["models"][:2],  # type: ignore[index]
        "base": None,
        "others": [{"name": "gpt", "model": "gpt-x", "endpoint": url}, {"name": "llama", "model": str(llama_dir)}],
        "other_concurrency": 1,
        "judge": "judge",
        "judge_endpoint": url,
        "concurrency": 1,
        "mt_bench": str(mt_bench_dir),
    }
    output = run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
    found = json.loads((output / "models.json").read_text())
    assert list(found) == ["gpt", "llama", "sft", "rlhf/policy-0"]
    for name in ("gpt", "llama"):
        assert "kl_to_init" not in found[name] and found[name].keys() >= {"reward", "gold", "mean_tokens", "mt_bench"}
        assert found[name]["judge_win_rate_vs_sft"] == 0.5 and found[name]["mt_bench_win_rate_vs_sft"] == 0.5
    assert found["llama"]["stop_rate"] < 1 and found["gpt"]["mean_tokens"] > 2
    rows = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert all(list(row["answers"]) == list(found) for row in rows)
    records = [json.loads(line) for line in (output.with_name("measured") / "others.jsonl").read_text().splitlines()]
    assert {each["has_ended"] for each in records if each["model"] == "gpt" and each["text"]} == {True, False}
    conversations = [json.loads(text) for model, text in asked if model == "gpt-x"]
    later = [each for each in conversations if len(each) == 3 and each[0]["content"] == "What is 3 plus 5?"]
    assert later and later[0][1] == {"role": "assistant", "content": "It is 8."}
    assert (output / "mt_bench" / "model_answer" / "llama.jsonl").is_file()

    kept = output.with_name("measured") / "others.jsonl"
    shutil.rmtree(output)
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:-1]) + lines[-1][:10])  # killed while it wrote the last one
    run_stage(
        tmp_path / "evaluate.yaml", evaluate.COMMAND, values | {"reward_functions": ["gemma2_post.tiny.gold:gold"]}
    )
    assert sorted(Counter(asked).values())[-2:] == [1, 2], "only what had failed was asked twice"
    assert len(kept.read_text().splitlines()) == len(lines)
    again = json.loads((output / "models.json").read_text())
    assert again["gpt"] == found["gpt"]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([{"name": "sft", "model": TEACHER}], "others: sft: two models have this name"),
        ([{"name": "a", "model": TEACHER}, {"name": "a", "model": TEACHER}], "others: a: two models have this name"),
        ([{"name": "a", "model": "m", "endpoint": "http://127.0.0.1:9/v1"}], "others: a: .* cannot be reached"),
        ([{"name": "a", "model": TEACHER, "api_key_variable": "K"}], "a has an api_key_variable and no endpoint"),
        ([{"name": "a"}], "model"),
    ],
)
def test_a_mistake_about_other_models_is_said_before_anything_is_answered(
    others: list[dict], message: str, evaluate_recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, evaluate_recipe | {"others": others})
    assert not (tmp_path / "runs" / "evaluate").exists()


def test_a_model_without_a_chat_format_is_refused(evaluate_recipe: Recipe, llama_dir: Path, tmp_path: Path) -> None:
    (llama_dir / "chat_template.jinja").unlink()
    others = [{"name": "llama", "model": str(llama_dir)}]
    with pytest.raises(UserError, match=r"others: llama: .*has no chat template, so it is no chat model"):
        run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, evaluate_recipe | {"others": others})
