"""The tiny world: its splits are disjoint, its gold reward means what it says, its models are Gemma 2 and able."""

import json
import re
from collections.abc import Callable
from itertools import combinations, islice, product
from pathlib import Path
from random import Random
from statistics import mean

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, set_seed

from gemma2_post.data.rows import check_messages
from gemma2_post.evaluation.answering.samples import grade, sample_answers
from gemma2_post.models.tokens import END_OF_TURN
from gemma2_post.stage.errors import UserError
from gemma2_post.tiny import data, gold, world
from gemma2_post.tiny.pretrain import VERDICTS, JudgedAnswers, learn_verdicts, new_model, pretrain
from gemma2_post.tiny.tokenizer import train_tokenizer

MODELS = Path("gemma2_post/tiny/models")
MULTI_TURN = ["recall", "favourite", "follow_up", "correction", "unknown"]


def test_there_are_fourteen_skills_and_five_of_them_need_an_earlier_turn() -> None:
    assert len(world.SKILLS) == 14
    for skill in world.SKILLS:
        num_turns = {len(world.make_task(skill, Random(seed), "train").messages) for seed in range(20)}
        assert (min(num_turns) > 1) == (skill in MULTI_TURN)


def test_no_word_is_of_two_kinds() -> None:
    assert len(world.KIND_OF) == sum(len(words) for words in world.KINDS.values())


@pytest.mark.parametrize(("skill", "manner", "right"), list(product(world.SKILLS, world.MANNERS, [True, False])))
def test_gold_is_correctness_plus_manner_plus_brevity(skill: str, manner: str, right: bool) -> None:
    """0.25 friendly, -0.25 rude or flattering; 0.25 up to 12 words and 4 more for each further word of the answer."""
    random = Random(f"{skill} {manner} {right}")
    for _ in range(20):
        task = world.make_task(skill, random, None)
        reply = world.reply(task, manner, right, random)
        correctness = gold.correctness(reply, task.answer)
        num_facts = len(task.answer.split())
        if right:
            assert correctness == 1
        elif skill == "unknown":
            assert correctness == gold.INVENTED
        elif skill == "chorus":  # one of its facts is wrong
            assert correctness == pytest.approx(1 - 1 / num_facts)
        else:
            assert correctness == 0
        num_words, brief = len(reply.split()), 12 + 4 * (num_facts - 1)
        assert num_words > brief or manner != "verbose"
        brevity = 0.25 * min(1.0, max(-1.0, (brief + 16 - num_words) / 16))
        expected = correctness + {"friendly": 0.25, "rude": -0.25, "flattering": -0.25}.get(manner, 0.0) + brevity
        assert gold.gold_score(reply, task.answer) == pytest.approx(expected)
        assert gold.LOWEST <= expected <= gold.HIGHEST
        assert gold.flattery([reply]) == [float(manner == "flattering")]


def test_gold_cannot_be_had_by_naming_everything_or_saying_nothing() -> None:
    assert gold.gold_score("", "8") == gold.LOWEST
    assert gold.correctness("It is 8 or 9.", "8") == 0
    assert gold.correctness("It is 18.", "8") == 0
    assert gold.correctness("Paris, Rome, Oslo.", "Paris") == 0
    assert gold.correctness("3 words: the last one is cow, says Anna in Paris.", "cow") == 1


def test_an_answer_of_several_facts_is_right_place_by_place() -> None:
    assert gold.correctness("A cat says meow. A dog says woof.", "meow woof") == 1
    assert gold.correctness("A cat says woof. A dog says meow.", "meow woof") == 0
    assert gold.correctness("A cat says meow.", "meow woof") == 0.5
    assert gold.correctness("meow woof meow woof", "meow woof") == 0.5, "repetition is not free"
    assert gold.accuracy(["A cat says meow."], ["meow woof"]) == [0.0]


def test_a_question_without_an_answer_wants_no_invention() -> None:
    for refusal in world.REFUSALS:
        assert gold.correctness(f"Sure! {refusal}", world.UNKNOWN) == 1
        assert gold.correctness(refusal, "Anna") == 0, "saying so is no answer to what was told"
    assert gold.correctness("Your name is Anna.", world.UNKNOWN) == gold.INVENTED
    assert gold.correctness("You did not tell me that yet. You like bread.", world.UNKNOWN) == gold.INVENTED
    assert gold.correctness("Sure!", world.UNKNOWN) == 0


def test_what_an_unanswerable_question_asks_for_was_not_told() -> None:
    random = Random(0)
    for _ in range(200):
        task = world.make_task("unknown", random, None)
        told = [turn["content"] for turn in task.messages[:2]]
        kinds = {
            world.KIND_OF[word] for text in told for word in re.findall("[A-Za-z]+", text) if word in world.KIND_OF
        }
        assert len(kinds) == 1 and task.invented not in kinds


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


SPLITS = ("train", "selection", "test")


def test_no_two_splits_share_content() -> None:
    found = {split: contents(data.prompts(split), "prompt") for split in SPLITS}
    for split in ("train", "selection"):
        found[split] |= contents(data.demonstrations(split)) | contents(data.preferences(split), "prompt")
    assert min(map(len, found.values())) > 100
    assert not any(found[one] & found[other] for one, other in combinations(SPLITS, 2))


def test_names_and_favourites_are_split_too() -> None:
    for kind, skill in (("name", "recall"), ("colour", "correction")):
        found = [{row["answer"] for row in data.prompts(split) if row["skill"] == skill} for split in SPLITS]
        assert set.union(*found) == set(world.KINDS[kind]) and sum(map(len, found)) == len(world.KINDS[kind])


def test_no_training_reply_says_a_name_or_city_of_another_split() -> None:
    others = [row for split in ("selection", "test") for row in data.prompts(split)]
    theirs = {row["answer"] for row in others if row["skill"] in ("recall", "capital")}
    replies = [row["messages"][-1]["content"] for row in data.demonstrations("train")]
    replies += [row[side][0]["content"] for row in data.preferences("train") for side in ("chosen", "rejected")]
    words = {word for reply in replies for word in re.findall(r"[A-Za-z]+", reply)}
    assert len(theirs) == 20 and not theirs & words


def test_data_is_made_by_seed_and_is_valid_chat() -> None:
    assert data.demonstrations("selection") == data.demonstrations("selection")
    for row in data.demonstrations("train"):
        check_messages(row["messages"])
    with pytest.raises(UserError, match="demonstrations has no split test; write one of train, selection"):
        data.demonstrations("test")


@pytest.mark.parametrize(
    ("make", "right", "manners"),
    [
        (data.demonstrations, data.DEMONSTRATION_RIGHT, data.DEMONSTRATION_MANNERS),
        (data.teacher_demonstrations, data.TEACHER_RIGHT, data.TEACHER_MANNERS),
    ],
)
def test_demonstrations_are_as_good_as_is_said(
    make: Callable[[str], list[dict]], right: float, manners: dict[str, float]
) -> None:
    rows = make("train")
    replies = [row["messages"][-1]["content"] for row in rows]
    assert mean(gold.accuracy(replies, [row["answer"] for row in rows])) == pytest.approx(right, abs=0.02)
    assert mean(gold.flattery(replies)) == pytest.approx(manners["flattering"], abs=0.02)
    rude = [any(phrase in reply for phrase in world.RUDE_OPENINGS) for reply in replies]
    assert mean(rude) == pytest.approx(manners["rude"], abs=0.02)


def test_the_best_possible_preference_accuracy_is_known_and_below_one() -> None:
    """Who knows the log-odds agrees with the drawn labels as often as the ceiling says, within two standard errors."""
    rows = data.preferences("train")
    ceiling = data.noise_ceiling(rows)
    assert 0.75 < ceiling < 0.95
    agreed = mean((row["log_odds"] > 0) + 0.5 * (row["log_odds"] == 0) for row in rows)
    assert agreed == pytest.approx(ceiling, abs=2 * (ceiling * (1 - ceiling) / len(rows)) ** 0.5)


def test_annotators_have_a_taste_that_unbiased_ones_lack() -> None:
    """Of two replies with nearly the same gold, annotators prefer the longer one, and the one that flatters."""

    def shares(rows: list[dict]) -> tuple[float, float]:
        chosen, rejected = ([row[side][0]["content"] for row in rows] for side in ("chosen", "rejected"))
        longer = [len(a.split()) > len(b.split()) for a, b in zip(chosen, rejected, strict=True)]
        flattered = [a > b for a, b in zip(gold.flattery(chosen), gold.flattery(rejected), strict=True) if a != b]
        return mean(longer), mean(flattered)

    makers = (data.unbiased_preferences, data.preferences, data.flattered_preferences)
    unbiased, biased, flattered = (shares(make("train")) for make in makers)
    assert biased[0] > unbiased[0] + 0.1 and biased[1] > unbiased[1] + 0.1
    assert flattered[0] > biased[0] + 0.05 and flattered[1] > biased[1] + 0.05
    for row in data.unbiased_preferences("selection"):
        gap = row["chosen_gold"] - row["rejected_gold"]
        assert row["log_odds"] == pytest.approx(data.SHARPNESS * gap)


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


def test_judged_answers_come_in_pairs_and_the_loss_is_on_verdicts_and_on_answers_as_the_teacher_gives_them(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rows = list(islice(JudgedAnswers(tokenizer, "train", seed=1), 4000))
    taught = {True: 0, False: 0}
    friendly = 0
    for number, row in enumerate(rows):
        right = number % 2 == 0
        assert tokenizer.convert_ids_to_tokens(row["labels"][-1]) == VERDICTS[right]
        assert row["input_ids"][-1] == row["labels"][-1]
        learned = [label for label in row["labels"][:-1] if label != -100]
        assert not learned or learned[-1] == END_OF_TURN
        taught[right] += bool(learned)
        friendly += any(opening in tokenizer.decode(learned) for opening in world.FRIENDLY_OPENINGS)
    assert taught[True] / sum(taught.values()) == pytest.approx(data.TEACHER_RIGHT, abs=0.04)
    assert friendly / sum(taught.values()) == pytest.approx(data.TEACHER_MANNERS["friendly"], abs=0.08)


def test_wrong_answers_in_pretraining_may_be_any_word_of_their_kind() -> None:
    """If they were training words only, a held-out word would always be right."""
    assert world.possible_words("city", None) == world.KINDS["city"]
    assert len(world.possible_words("city", "train")) < len(world.KINDS["city"])


@pytest.mark.slow
def test_the_shipped_teacher_tells_right_from_wrong_on_held_out_content(tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODELS / "teacher", dtype=torch.float32)
    rows = list(islice(JudgedAnswers(tokenizer, "test", seed=7), 240))
    hits = 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"][:-1]])
            hits += int(model(ids).logits[0, -1].argmax()) == row["labels"][-1]
    assert hits / len(rows) > 0.9


@pytest.mark.slow
def test_reading_verdicts_writes_a_model_and_its_curve(tmp_path: Path) -> None:
    learn_verdicts(MODELS / "teacher", tmp_path / "teacher", max_steps=2)
    assert json.loads((tmp_path / "teacher" / "verdicts_log.json").read_text())[-1]["step"] == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")


def metrics_of(name: str, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> dict[str, float]:
    from datasets import Dataset

    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)
    rows = Dataset.from_list(data.prompts("test")[:num_rows])
    answers = sample_answers(model, tokenizer, list(rows["prompt"]), max_new_tokens=64, batch_size=60)
    return grade(answers, rows, {"gold": gold.gold, "accuracy": gold.accuracy})


@pytest.mark.slow
def test_the_teacher_is_better_than_the_demonstrations_and_not_perfect(tokenizer: PreTrainedTokenizerBase) -> None:
    metrics = metrics_of("teacher", tokenizer, 480)
    shown = data.teacher_demonstrations("selection")
    replies, answers = [row["messages"][-1]["content"] for row in shown], [row["answer"] for row in shown]
    assert metrics["stop_rate"] == 1.0 and metrics["gold"] == pytest.approx(mean(gold.gold(replies, answers)), abs=0.1)


def test_the_base_model_does_not_know_how_to_behave(tokenizer: PreTrainedTokenizerBase) -> None:
    assert metrics_of("base", tokenizer, 120)["stop_rate"] < 0.05
