"""The likelihood of conversations under a model that is trained on such."""

import torch
from datasets import Dataset
from transformers import Trainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from gemma2_post.evaluation.answering.samples import evaluating, gather_rows, share_of
from gemma2_post.models.tokens import PAD


def mean_nll(trainer: Trainer, conversations: Dataset) -> float:
    """-log p in nats, the mean over all tokens in the loss, whatever batches and processes they are spread over.

    Args:
        trainer: An `SFTTrainer`, whose model computes log-probabilities without building the logits.
        conversations: Rows with `input_ids` and `labels`.
    """
    batch_size, collate = trainer.args.per_device_eval_batch_size, DataCollatorForLanguageModeling(pad_token_id=PAD)
    mine = share_of(len(conversations), trainer.accelerator)
    sums: list[tuple[float, int]] = []
    with evaluating(trainer.model_wrapped), torch.no_grad():
        for start in range(0, len(mine), batch_size):
            batch = collate([conversations[i] for i in mine[start : start + batch_size]])
            inputs = {name: each.to(trainer.accelerator.device) for name, each in batch.items()}
            outputs = trainer.model_wrapped(**inputs, use_cache=False, fused_lm_head=True)
            log_probs = outputs.log_probs.double().sum(1).tolist()  # 0 where there is no loss
            sums += zip(log_probs, outputs.label_mask.sum(1).tolist(), strict=True)
    log_probs, num_tokens = (sum(each) for each in zip(*gather_rows(mine, sums, len(conversations)), strict=True))
    return -log_probs / num_tokens
