"""Makes the tokenizer and the two models of the tiny world again, from nothing.

    python -m gemma2_post.tiny.pretrain        # both: about two hours on two cores; or only base, or only teacher

The base model knows the language of the world and no chat format; the larger one is then taught to answer by the SFT
stage, and is the teacher. An interrupted run goes on from its newest checkpoint. The logs lie beside the shipped
models, the numbers are in `recipes/tiny/README.md`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import torch
from torch.utils.data import IterableDataset
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from gemma2_post.core import gemma
from gemma2_post.tiny.corpus import documents
from gemma2_post.tiny.tokenizer import VOCAB_SIZE, train_tokenizer

ROW_TOKENS = 160
SHAPES = {
    "base": {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2},
    "teacher": {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4},
}
LEARNING_RATE = {"base": 2e-3, "teacher": 1.5e-3}
PASSAGES = {"base": (100, 140), "teacher": (12, 20)}
"""Passages per document. Long ones, so that the base model ends nothing by itself: that is for SFT to teach."""


class PackedDocuments(IterableDataset):
    """Rows of `ROW_TOKENS` ids out of an endless stream of `<bos>document<eos>`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, passages: tuple[int, int], seed: int):
        self.tokenizer, self.passages, self.seed = tokenizer, passages, seed

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        ids: list[int] = []
        for document in documents(Random(self.seed), *self.passages):
            ids += [*self.tokenizer(document)["input_ids"], self.tokenizer.eos_token_id]
            while len(ids) >= ROW_TOKENS:
                row, ids = ids[:ROW_TOKENS], ids[ROW_TOKENS:]
                yield {"input_ids": row, "labels": row}


def new_model(name: str) -> Gemma2ForCausalLM:
    """A Gemma 2 with random weights and everything that makes it one: both soft-caps, a window shorter than the
    conversations in every other layer, grouped-query attention, pre- and post-norms, a tied head."""
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


def pretrain(name: str, output_dir: Path, max_steps: int = 3000, seed: int = 0) -> None:
    set_seed(seed)
    tokenizer = train_tokenizer()
    model = new_model(name)

    # The text has no control token. The softmax would push the rows of these ids, all alike, to where a later SFT
    # with frozen embeddings cannot reach them; so they stay as they were drawn.
    absent = torch.tensor([id for id in range(108) if id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)])
    model.get_input_embeddings().weight.register_hook(lambda gradient: gradient.index_fill(0, absent, 0.0))

    held_out = list(islice(PackedDocuments(tokenizer, PASSAGES[name], seed + 1_000_000), 256))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output_dir / "trainer"),
            max_steps=max_steps,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=32,
            learning_rate=LEARNING_RATE[name],
            lr_scheduler_type="cosine",
            warmup_steps=100,
            adam_beta2=0.98,
            weight_decay=0.0,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=50,
            eval_strategy="steps",
            eval_steps=500,
            save_steps=500,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=PackedDocuments(tokenizer, PASSAGES[name], seed),
        eval_dataset=held_out,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(trainer.args.output_dir))
    model.generation_config = gemma.generation_config()
    model.to(torch.bfloat16).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    (output_dir / "pretrain_log.json").write_text(json.dumps(trainer.state.log_history, indent=1))


def teach(pretrained: Path, output_dir: Path) -> None:
    """The SFT stage on ideal demonstrations, in a process of its own as every stage."""
    recipe = ["--config", str(Path(__file__).with_name("teacher.yaml"))]
    names = ["--model_name_or_path", str(pretrained), "--output_dir", str(output_dir)]
    subprocess.run([sys.executable, "-m", "gemma2_post.sft", *recipe, *names], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SHAPES), metavar="base|teacher")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/pretrain"))
    arguments = parser.parse_args()
    if "base" in arguments.names:
        pretrain("base", arguments.output_dir / "base")
    if "teacher" in arguments.names:
        pretrain("teacher", arguments.output_dir / "pretrained")
        teach(arguments.output_dir / "pretrained", arguments.output_dir / "teacher")


if __name__ == "__main__":
    main()
