"""Talk to the output of any stage, or to any Gemma 2 chat model: multi-turn, streaming.

gemma2-post chat runs/tiny/sft
gemma2-post chat runs/tiny/sft --prompt "What is 3 plus 5?"
"""

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TextStreamer

from gemma2_post.models.loading import disable_cpu_repacking, generation_config, load_config
from gemma2_post.models.tokenizer import load_tokenizer
from gemma2_post.stage.errors import located

_QUANTIZATION = {
    None: None,
    "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
    "8bit": BitsAndBytesConfig(load_in_8bit=True),
}


def chat(path: str, prompt: str | None, load: str | None, temperature: float, max_new_tokens: int) -> None:
    """Answers `prompt` and returns, or without one talks with the person at the keyboard until the input ends.

    Args:
        load: "4bit" or "8bit", through bitsandbytes; None: bf16 on a GPU, fp32 without one.
        temperature: 0 for the most likely answer.

    Raises:
        UserError: `path` holds no Gemma 2 chat model.
    """
    with located("chat"):
        tokenizer = load_tokenizer(path, load_config(path))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.bfloat16 if device == "cuda" or load else torch.float32,
        attn_implementation="eager",
        quantization_config=_QUANTIZATION[load],
        device_map=device,
    )
    disable_cpu_repacking(model)
    model.generation_config = generation_config()
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}

    def answer(messages: list[dict[str, str]]) -> str:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(device)
        generated = model.generate(**inputs, **sampling, max_new_tokens=max_new_tokens, streamer=streamer)
        return tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    if prompt is not None:
        answer([{"role": "user", "content": prompt}])
        return
    print("Type a message; an empty one starts a new conversation, Ctrl-D ends the chat.")
    messages: list[dict[str, str]] = []
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
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": answer(messages)})
