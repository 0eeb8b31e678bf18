"""Rebuilds the tokenizer and the two models of the tiny world from scratch.

    python -m gemma2_post.tiny.pretrain        # both: about an hour on two cores; or only base, or only teacher

The base model knows the language of the world but no chat format. The larger model then learns to answer in the SFT
stage, and reads which answers are right and which are wrong; it is the teacher, and the base of the reward model. An
interrupted run resumes from its newest checkpoint. The logs are next to the shipped models; the numbers are in
`recipes/tiny/README.md`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from copy import copy
from itertools import islice
from pathlib import Path
from random import Random

import numpy
import torch
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction, get_last_checkpoint

from gemma2_post.models.loading import generation_config, load_config
from gemma2_post.models.saving import save_model
from gemma2_post.models.tokenizer import load_tokenizer, save_tokenizer
from gemma2_post.stage.errors import located
from gemma2_post.tiny import world
from gemma2_post.tiny.corpus import documents
from gemma2_post.tiny.data import TEACHER_MANNERS, TEACHER_RIGHT
from gemma2_post.tiny.tokenizer import VOCAB_SIZE, train_tokenizer, write_sentencepiece, write_tokenizer_config

ROW_TOKENS = 160
SHAPES = {
    "base": {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2},
    "teacher": {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4},
}
LEARNING_RATE = {"base": 2e-3, "teacher": 1.5e-3}
STEPS = {"base": 2500, "teacher": 1500}
PASSAGES = {"base": (100, 140), "teacher": (12, 20)}
"""Fewest and most passages per document. The base model reads long ones, so only SFT teaches it to end a text."""
VERDICTS = {False: "<unused0>", True: "<unused1>"}
"""Tokens that follow a wrong and a right answer, in place of a next turn, in the teacher's last training."""


class PackedDocuments(IterableDataset):
    """Rows of `ROW_TOKENS` ids from an endless stream of `<bos>document<eos>`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, passages: tuple[int, int], seed: int) -> None:
        self.tokenizer, self.passages, self.seed = tokenizer, passages, seed

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        ids: list[int] = []
        for document in documents(Random(self.seed), *self.passages):
            ids += [*self.tokenizer(document)["input_ids"], self.tokenizer.eos_token_id]
            while len(ids) >= ROW_TOKENS:
                row, ids = ids[:ROW_TOKENS], ids[ROW_TOKENS:]
                yield {"input_ids": row, "labels": row}


def new_model(name: str) -> Gemma2ForCausalLM:
    """A Gemma 2 with random weights and all its features: both soft-caps, a window shorter than the conversations in
    every other layer, grouped-query attention, pre- and post-norms, a tied head."""
    config = Gemma2Config(
        vocab_size=VOCAB_SIZE,
        num_hidden_layers=4,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=32,
        max_position_embeddings=512,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        initializer_range=SHAPES[name]["hidden_size"] ** -0.5,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        **SHAPES[name],
    )
    return Gemma2ForCausalLM._from_config(config, attn_implementation="eager")


def _arguments(output_dir: Path, max_steps: int, seed: int, **values: object) -> TrainingArguments:
    """The training arguments of both trainings here."""
    return TrainingArguments(
        output_dir=str(output_dir / "trainer"),
        max_steps=max_steps,
        adam_beta2=0.98,
        weight_decay=0.0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=50,
        eval_strategy="steps",
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        **values,
    )


def pretrain(name: str, output_dir: Path, max_steps: int, seed: int = 0) -> None:
    """Trains a model on the world's text.

    Args:
        name: "base" or "teacher", one of `SHAPES`.
        output_dir: Folder for the model, its tokenizer and `pretrain_log.json`.
    """
    set_seed(seed)
    tokenizer = train_tokenizer()
    model = new_model(name)
    # The text has no control tokens. The softmax would push the rows of their ids, all alike, to where a later SFT
    # with frozen embeddings cannot reach them, so these rows keep their initial values.
    absent = torch.tensor([id for id in range(108) if id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)])
    model.get_input_embeddings().weight.register_hook(lambda gradient: gradient.index_fill(0, absent, 0.0))
    held_out = list(islice(PackedDocuments(tokenizer, PASSAGES[name], seed + 1_000_000), 256))
    trainer = Trainer(
        model=model,
        args=_arguments(
            output_dir,
            max_steps,
            seed,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=32,
            learning_rate=LEARNING_RATE[name],
            lr_scheduler_type="cosine",
            warmup_steps=100,
            eval_steps=500,
            save_steps=500,
        ),
        train_dataset=PackedDocuments(tokenizer, PASSAGES[name], seed),
        eval_dataset=held_out,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(trainer.args.output_dir))
    model.generation_config = generation_config()
    model.to(torch.bfloat16).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    write_tokenizer_config(output_dir)
    write_sentencepiece(output_dir)
    (output_dir / "pretrain_log.json").write_text(json.dumps(trainer.state.log_history, indent=1))


def teach(pretrained: Path, output_dir: Path) -> None:
    """Runs the SFT stage on the teacher's demonstrations, in its own process like every stage."""
    recipe = ["--config", str(Path(__file__).with_name("teacher.yaml"))]
    names = ["--model_name_or_path", str(pretrained), "--output_dir", str(output_dir)]
    subprocess.run([sys.executable, "-m", "gemma2_post.sft", *recipe, *names], check=True)


class JudgedAnswers(IterableDataset):
    """Conversations with a right and a wrong answer in the same manner, each followed by its verdict.

    The loss is on the verdict, and on as many answers of each kind as the teacher gives, so it keeps its distribution.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, split: world.Split | None, seed: int) -> None:
        self.tokenizer, self.split, self.seed = tokenizer, split, seed
        self.verdict_ids = {right: tokenizer.convert_tokens_to_ids(verdict) for right, verdict in VERDICTS.items()}

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        """Endless rows: `input_ids`, `labels` and `attention_mask`, each of the row's length."""
        random = Random(self.seed)
        while True:
            task = world.make_task(random.choice(world.SKILLS), random, self.split)
            manner = random.choice(world.MANNERS)
            prompt = self.tokenizer.apply_chat_template(list(task.messages), add_generation_prompt=True)["input_ids"]
            for right in (True, False):
                answer = {"role": "assistant", "content": world.reply(task, manner, right, random)}
                ids = self.tokenizer.apply_chat_template([*task.messages, answer])["input_ids"]
                said = ids[len(prompt) : -1]  # without the line break that ends each turn
                share = TEACHER_MANNERS[manner] * (TEACHER_RIGHT if right else 1 - TEACHER_RIGHT)
                learned = said if random.random() < share / max(TEACHER_MANNERS.values()) else [-100] * len(said)
                labels = [-100] * len(prompt) + learned + [-100]
                verdict = self.verdict_ids[right]
                yield {
                    "input_ids": [*ids, verdict],
                    "labels": [*labels, verdict],
                    "attention_mask": [1] * (len(ids) + 1),
                }


def learn_verdicts(taught: Path, output_dir: Path, max_steps: int = 1500, seed: int = 0) -> None:
    """Trains the taught model on right and wrong answers with their verdicts.

    Otherwise no hidden state of this four-layer model separates right from wrong answers, and no reward model can be
    trained from it (docs/experiments.md).
    """
    set_seed(seed)
    with located("pretrain"):
        tokenizer = load_tokenizer(str(taught), load_config(str(taught)))
    model = AutoModelForCausalLM.from_pretrained(taught, dtype=torch.float32, attn_implementation="eager")
    padded_right = copy(tokenizer)
    padded_right.padding_side = "right"
    verdict_ids = tokenizer.convert_tokens_to_ids(list(VERDICTS.values()))

    def verdict_accuracy(prediction: EvalPrediction) -> dict[str, float]:
        said, expected = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        is_verdict = numpy.isin(expected, verdict_ids)
        return {"verdict_accuracy": float((said[is_verdict] == expected[is_verdict]).mean())}

    trainer = Trainer(
        model=model,
        args=_arguments(
            output_dir,
            max_steps,
            seed,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=96,
            learning_rate=1e-3,
            lr_scheduler_type="linear",
            warmup_steps=50,
            eval_steps=100,
            save_steps=250,
        ),
        train_dataset=JudgedAnswers(tokenizer, split=None, seed=seed),
        eval_dataset=list(islice(JudgedAnswers(tokenizer, split="selection", seed=seed + 12_345), 480)),
        data_collator=DataCollatorForSeq2Seq(padded_right),
        compute_metrics=verdict_accuracy,
        preprocess_logits_for_metrics=lambda logits, _: logits.argmax(-1),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(trainer.args.output_dir))
    save_model(trainer.model, trainer.model.state_dict(), output_dir, torch.bfloat16)
    save_tokenizer(tokenizer, output_dir)
    (output_dir / "verdicts_log.json").write_text(json.dumps(trainer.state.log_history, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SHAPES), metavar="base|teacher")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/pretrain"))
    arguments = parser.parse_args()
    pretrained = arguments.output_dir / "pretrained"
    if "base" in arguments.names:
        pretrain("base", arguments.output_dir / "base", STEPS["base"])
    if "teacher" in arguments.names:
        if not (pretrained / "pretrain_log.json").is_file():
            pretrain("teacher", pretrained, STEPS["teacher"])
        teach(pretrained, arguments.output_dir / "taught")
        learn_verdicts(arguments.output_dir / "taught", arguments.output_dir / "teacher")


if __name__ == "__main__":
    main()
