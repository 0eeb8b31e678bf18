"""Talk to the output of any stage, or to any Gemma 2 chat model: multi-turn, streaming.

gemma2-post chat runs/tiny/sft
gemma2-post chat runs/tiny/sft --prompt "What is 3 plus 5?"
"""

import sys

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from gemma2_post.data.turns import InvalidRow, Message, check_messages
from gemma2_post.models.arguments import check_prompt_length
from gemma2_post.models.loading import frozen_arguments, load_config, load_model
from gemma2_post.models.tokenizer import load_tokenizer
from gemma2_post.stage.bounds import COUNT, NOT_NEGATIVE
from gemma2_post.stage.errors import UserError, located

LONGEST = 512
"""Tokens of the longest answer, if nothing else is said."""


def chat(path: str, prompt: str | None, load: str | None, temperature: float, max_new_tokens: int | None) -> None:
    """Answers `prompt` and returns, or without one talks with the person at the keyboard until the input ends.

    Args:
        load: "4bit" or "8bit", through bitsandbytes; None: bf16 on a GPU, fp32 without one.
        temperature: 0 for the most likely answer.
        max_new_tokens: None for 512, or half of the model's positions if that is less.

    Raises:
        UserError: `path` holds no Gemma 2 chat model, or nothing can be answered like this.
    """
    with located("chat"):
        for name, problem in (
            ("--temperature", NOT_NEGATIVE.problem(temperature)),
            ("--max_new_tokens", COUNT.problem(max_new_tokens)),
        ):
            if problem:
                raise UserError(f"{name} {problem}")
        config = load_config(path)
        tokenizer, positions = load_tokenizer(path, config), config.max_position_embeddings
        max_new_tokens = max_new_tokens or min(LONGEST, positions // 2)
        longest = check_prompt_length(None, "--max_new_tokens", max_new_tokens, positions)
        messages: list[Message] = []
        if prompt is not None:
            messages = [{"role": "user", "content": prompt}]
            if problem := problem_of(messages, tokenizer, longest):
                raise UserError(f"--prompt: {problem}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" or load else "float32"
    model = load_model(frozen_arguments(path, dtype, load), device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}

    def answer(messages: list[Message]) -> str:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(device)
        generated = model.generate(**inputs, **sampling, max_new_tokens=max_new_tokens, streamer=streamer)
        return tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    if messages:
        answer(messages)
        return
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # one bad byte must not end the session
    print("Type a message; an empty one starts a new conversation, Ctrl-D ends the chat.")
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not text:
            messages = []
            print("(new conversation)")
            continue
        asked: list[Message] = [*messages, {"role": "user", "content": text}]
        if problem := problem_of(asked, tokenizer, longest):
            print(f"(not asked: {problem})")
            continue
        try:
            messages = [*asked, {"role": "assistant", "content": answer(asked)}]
        except KeyboardInterrupt:
            print("\n(stopped; the last message is not part of the conversation)")


def problem_of(messages: list[Message], tokenizer: PreTrainedTokenizerBase, longest: int) -> str:
    """Why these messages cannot be answered; empty if they can.

    Args:
        longest: Most tokens that the messages may have.
    """
    try:
        check_messages(messages[-1:], last="user")
    except InvalidRow as problem:
        return str(problem).replace("turn 0", "the message")
    num_tokens = len(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    )
    if num_tokens > longest:
        return f"the conversation has {num_tokens} tokens, and the model reads {longest} beside its answer; start anew"
    return ""
