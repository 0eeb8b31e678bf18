"""The tiny world: its splits are disjoint, its gold reward means what it says, its models are Gemma 2 and able."""

import json
import re
from itertools import islice, product
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, set_seed

from gemma2_post.data.rows import check_messages
from gemma2_post.evaluation.samples import grade, sample_answers
from gemma2_post.models.tokens import END_OF_TURN
from gemma2_post.tiny import data, gold, world
from gemma2_post.tiny.pretrain import VERDICTS, JudgedAnswers, learn_verdicts, new_model, pretrain
from gemma2_post.tiny.tokenizer import train_tokenizer

MODELS = Path("gemma2_post/tiny/models")
MULTI_TURN = ["recall", "favourite", "follow_up", "correction"]


def test_there_are_twelve_skills_and_four_of_them_need_an_earlier_turn() -> None:
    assert len(world.SKILLS) == 12
    for skill in world.SKILLS:
        num_turns = {len(world.make_task(skill, Random(seed), held_out=False).messages) for seed in range(20)}
        assert (min(num_turns) > 1) == (skill in MULTI_TURN)


def test_no_word_is_of_two_kinds() -> None:
    assert len(world.KIND_OF) == sum(len(words) for words in world.KINDS.values())


@pytest.mark.parametrize(("skill", "manner", "right"), list(product(world.SKILLS, world.MANNERS, [True, False])))
def test_gold_is_correctness_plus_manner_plus_brevity(skill: str, manner: str, right: bool) -> None:
    """1 if right; 0.25 friendly, -0.25 rude; 0.25 up to 12 words, which only verbose replies exceed, 0 from 28."""
    random = Random(f"{skill} {manner} {right}")
    for _ in range(20):
        task = world.make_task(skill, random, held_out=None)
        reply = world.reply(task, manner, right, random)
        expected = float(right) + {"friendly": 0.25, "rude": -0.25}.get(manner, 0.0)
        num_words = len(reply.split())
        assert (num_words > 12) == (manner == "verbose")
        expected += 0.25 * min(1.0, max(0.0, (28 - num_words) / 16))
        assert gold.gold_score(reply, task.answer) == pytest.approx(expected)
        assert gold.LOWEST <= expected <= gold.HIGHEST


def test_gold_cannot_be_had_by_naming_everything_or_saying_nothing() -> None:
    assert gold.gold_score("", "8") == gold.LOWEST
    assert not gold.is_right("It is 8 or 9.", "8")
    assert not gold.is_right("It is 18.", "8")
    assert not gold.is_right("Paris, Rome, Oslo.", "Paris")
    assert gold.is_right("3 words: the last one is cow, says Anna in Paris.", "cow")


def contents(rows: list[dict], column: str = "messages") -> set[tuple]:
    """What single questions are about: the skill and the set of content words and numbers in the question."""
    skip = {"What", "Which", "How", "Please", "Tell", "what", "which", "how", "please", "tell"}
    found = set()
    for row in rows:
        if row["skill"] in ("sum", "bigger", "opposite", "capital", "sound", "pick", "count"):
            words = (
                row[column][0]["content"]
                .replace("?", " ")
                .replace(",", " ")
                .replace(":", " ")
                .replace(".", " ")
                .split()
            )
            vocabulary = {*world.KIND_OF, *world.CAPITALS} - skip
            kind = "words" if row["skill"] in ("pick", "count") else row["skill"]
            found.add((kind, *sorted(word for word in words if word in vocabulary)))
    return found


def test_held_out_content_occurs_in_no_training_data() -> None:
    training = contents(data.demonstrations("train")) | contents(data.prompts("train"), "prompt")
    training |= contents(data.preferences("train"), "prompt")
    held_out = contents(data.demonstrations("held_out")) | contents(data.prompts("held_out"), "prompt")
    held_out |= contents(data.preferences("held_out"), "prompt")
    assert len(held_out) > 100 and not training & held_out


def test_names_and_favourites_are_split_too() -> None:
    for kind, skill in (("name", "recall"), ("colour", "correction")):
        train, held_out = (
            {row["answer"] for row in data.demonstrations(split) if row["skill"] == skill}
            for split in ("train", "held_out")
        )
        assert train | held_out == set(world.KINDS[kind]) and not train & held_out


def test_no_training_reply_says_a_held_out_name_or_city() -> None:
    held_out = {row["answer"] for row in data.demonstrations("held_out") if row["skill"] in ("recall", "capital")}
    replies = [row["messages"][-1]["content"] for row in data.demonstrations("train")]
    replies += [row[side][0]["content"] for row in data.preferences("train") for side in ("chosen", "rejected")]
    words = {word for reply in replies for word in re.findall(r"[A-Za-z]+", reply)}
    assert len(held_out) == 10 and not held_out & words


def test_data_is_made_by_seed_and_is_valid_chat() -> None:
    assert data.demonstrations("held_out") == data.demonstrations("held_out")
    for row in data.demonstrations("train"):
        check_messages(row["messages"])


def test_demonstrations_are_of_mixed_quality() -> None:
    rows = data.demonstrations("train")
    replies = [row["messages"][-1]["content"] for row in rows]
    right = sum(gold.accuracy(replies, [row["answer"] for row in rows])) / len(rows)
    rude = sum(any(phrase in reply for phrase in world.RUDE_OPENINGS) for reply in replies) / len(rows)
    assert right == pytest.approx(0.85, abs=0.02) and rude == pytest.approx(0.15, abs=0.02)


def test_the_best_possible_preference_accuracy_is_known_and_below_one() -> None:
    """Gold agrees with the drawn labels as often as the noise ceiling says, within two standard errors."""
    rows = data.preferences("train")
    agreed = sum(
        (row["chosen_gold"] > row["rejected_gold"]) + 0.5 * (row["chosen_gold"] == row["rejected_gold"])
        for row in rows
    )
    ceiling = data.noise_ceiling(rows)
    assert 0.75 < ceiling < 0.95
    assert agreed / len(rows) == pytest.approx(ceiling, abs=2 * (ceiling * (1 - ceiling) / len(rows)) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most_parameters"), [("base", 1_500_000), ("teacher", 6_000_000)])
def test_a_shipped_model_has_everything_that_makes_it_a_gemma_2(
    name: str, most_parameters: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = AutoConfig.from_pretrained(MODELS / name)
    assert config.attn_logit_softcapping == 50.0 and config.final_logit_softcapping == 30.0
    assert config.layer_types == ["sliding_attention", "full_attention"] * 2
    longest = max(
        len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in data.demonstrations("train")
    )
    assert config.sliding_window < longest
    assert config.num_key_value_heads < config.num_attention_heads and config.tie_word_embeddings
    model = AutoModelForCausalLM.from_pretrained(MODELS / name)
    assert sum(parameter.numel() for parameter in model.parameters()) <= most_parameters


def test_the_shipped_models_are_small() -> None:
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= 12_000_000


def test_the_shipped_tokenizer_is_the_one_that_the_script_makes(tokenizer: PreTrainedTokenizerBase) -> None:
    assert json.loads(train_tokenizer().backend_tokenizer.to_str()) == json.loads(
        (MODELS / "base" / "tokenizer.json").read_text()
    )
    assert (MODELS / "base" / "tokenizer.json").read_bytes() == (MODELS / "teacher" / "tokenizer.json").read_bytes()
    assert tokenizer("Tell me: 12 + ~?")["input_ids"].count(3) == 0 and 3 in tokenizer("ü")["input_ids"]


@pytest.mark.slow
def test_pretraining_leaves_the_rows_of_control_tokens_as_they_were_drawn(tmp_path: Path) -> None:
    pretrain("base", tmp_path / "base", max_steps=2)
    set_seed(0)
    drawn = new_model("base").get_input_embeddings().weight.bfloat16()
    rows = AutoModelForCausalLM.from_pretrained(tmp_path / "base").get_input_embeddings().weight
    assert torch.equal(rows[3:108], drawn[3:108]) and not torch.equal(rows[108:], drawn[108:])


def test_judged_answers_come_in_pairs_and_the_loss_is_on_verdicts_and_examples(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rows = list(islice(JudgedAnswers(tokenizer, held_out=False, seed=1), 200))
    for right, wrong in zip(rows[::2], rows[1::2], strict=True):
        verdicts = [tokenizer.convert_ids_to_tokens(row["labels"][-1]) for row in (right, wrong)]
        assert verdicts == [VERDICTS[True], VERDICTS[False]]
        assert all(row["input_ids"][-1] == row["labels"][-1] for row in (right, wrong))
        assert [label for label in wrong["labels"] if label != -100] == wrong["labels"][-1:]
        taught = [label for label in right["labels"][:-1] if label != -100]
        is_friendly = any(opening in tokenizer.decode(right["input_ids"]) for opening in world.FRIENDLY_OPENINGS)
        assert not taught or (is_friendly and taught[-1] == END_OF_TURN)
    assert 10 < sum(len(set(row["labels"])) > 2 for row in rows) < 50


def test_wrong_answers_in_pretraining_may_be_any_word_of_their_kind() -> None:
    """If they were training words only, a held-out word would always be right."""
    assert world.wrong_words("city", None) == world.KINDS["city"]
    assert len(world.wrong_words("city", False)) < len(world.KINDS["city"])


@pytest.mark.slow
def test_the_shipped_teacher_tells_right_from_wrong_on_held_out_content(tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODELS / "teacher", dtype=torch.float32)
    rows = list(islice(JudgedAnswers(tokenizer, held_out=True, seed=7), 240))
    hits = 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"][:-1]])
            hits += int(model(ids).logits[0, -1].argmax()) == row["labels"][-1]
    assert hits / len(rows) > 0.95


@pytest.mark.slow
def test_reading_verdicts_writes_a_model_and_its_curve(tmp_path: Path) -> None:
    learn_verdicts(MODELS / "teacher", tmp_path / "teacher", max_steps=2)
    assert json.loads((tmp_path / "teacher" / "verdicts_log.json").read_text())[-1]["step"] == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")


def greedy_metrics(name: str, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> dict[str, float]:
    from datasets import Dataset

    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)
    rows = Dataset.from_list(data.prompts("held_out")[:num_rows])
    answers = sample_answers(model, tokenizer, list(rows["prompt"]), max_new_tokens=48, temperature=0.0, batch_size=60)
    return grade(answers, rows, {"gold": gold.gold, "accuracy": gold.accuracy})


@pytest.mark.slow
def test_the_teacher_is_right_and_kind_on_held_out_prompts(tokenizer: PreTrainedTokenizerBase) -> None:
    metrics = greedy_metrics("teacher", tokenizer, 480)
    assert metrics["accuracy"] >= 0.95 and metrics["stop_rate"] == 1.0 and metrics["gold"] > 1.4


def test_the_base_model_does_not_know_how_to_behave(tokenizer: PreTrainedTokenizerBase) -> None:
    assert greedy_metrics("base", tokenizer, 120)["stop_rate"] < 0.05
