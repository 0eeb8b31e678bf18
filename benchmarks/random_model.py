"""Models of Gemma 2's shapes with random weights, and rows of an exact length: what time and memory depend on.

python benchmarks/random_model.py 2b DIR
"""

import json
import sys
from pathlib import Path
from statistics import NormalDist

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2ForSequenceClassification

from gemma2_post.models import reward_model
from gemma2_post.models.saving import save_configs
from gemma2_post.models.shapes import SCORE_HEAD, SHAPES, tensor_shapes
from gemma2_post.models.streaming import write_tensors
from gemma2_post.models.tokenizer import load_tokenizer
from gemma2_post.models.tokens import END_OF_TURN

TINY = Path("gemma2_post/tiny/models/base")
SCALE = 0.02
"""Standard deviation of the weights, as transformers initializes them."""
END_LOGIT = 40.0
"""Logit of `<end_of_turn>` where a model ends its turn, before the soft-cap."""
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"num_hidden_layers": 2, "vocab_size": 2048}


def config_of(shape: str, num_layers: int | None = None, is_small: bool = False) -> Gemma2Config:
    """The config of 2b, 9b, or 27b.

    Args:
        num_layers: Fewer layers than it has.
        is_small: Whether to keep only the size of its heads, to try a script.
    """
    values = SHAPES[f"google/gemma-2-{shape}"] | (SMALL if is_small else {})
    return Gemma2Config(**values | ({"num_hidden_layers": num_layers} if num_layers else {}))


def write_model(folder: Path, config: Gemma2Config, mean_answer: float = 128, is_reward_model: bool = False) -> None:
    """Writes a model in bf16 with a tokenizer, if it is not there yet; holds one tensor at a time.

    Its answers end at random, because stages refuse a model that never ends: the last MLP adds the embedding of
    `<end_of_turn>` where the first neuron, a standard normal projection of the hidden state, is above a threshold, and
    subtracts it where it is not, with more weight than all else. The squares of the others add up to a constant,
    against which that of the first is held.

    Args:
        mean_answer: Mean length of its answers, in tokens.
    """
    threshold = NormalDist().inv_cdf(1 - 1 / mean_answer)
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shapes = tensor_shapes(config.to_dict(), str(folder))
    if is_reward_model:
        shapes[SCORE_HEAD] = (1, config.hidden_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(0)

    last, inner = f"model.layers.{config.num_hidden_layers - 1}.", config.intermediate_size
    against = torch.full((inner,), -(threshold**2) / (inner / 2), device=device)
    against[0] = 1
    end: list[torch.Tensor] = []

    def tensor_of(name: str) -> torch.Tensor:
        if "norm" in name:  # Gemma's norms multiply by 1 + weight
            return torch.full(shapes[name], 9.0 if name == f"{last}post_feedforward_layernorm.weight" else 0.0)
        if name in (f"{last}mlp.gate_proj.weight", f"{last}mlp.up_proj.weight"):  # the same in both: squares
            same = torch.Generator(device).manual_seed(1)
            return torch.randn(shapes[name], generator=same, device=device) / config.hidden_size**0.5
        if name == f"{last}mlp.down_proj.weight":
            return end[0][:, None] * against
        tensor = SCALE * torch.randn(shapes[name], generator=draw, device=device, dtype=torch.bfloat16)
        if name == "model.embed_tokens.weight":
            tensor[END_OF_TURN] *= END_LOGIT / config.hidden_size**0.5 / tensor[END_OF_TURN].norm()
            end.append(tensor[END_OF_TURN].float())
        return tensor

    sizes = {name: torch.Size(shape) for name, shape in shapes.items()}
    write_tensors(folder, sizes, torch.bfloat16, tensor_of, {SCORE_HEAD})
    _write_tokenizer(folder, config.vocab_size)
    model_class = Gemma2ForSequenceClassification if is_reward_model else Gemma2ForCausalLM
    if is_reward_model:
        config = Gemma2Config(**config.to_dict() | {"id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}})
    save_configs(model_class, config, folder, torch.bfloat16)
    if is_reward_model:
        canary = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
        tokenizer = load_tokenizer(str(folder), config)
        reward_model.seal(folder, tokenizer, [canary], 0.0, 1.0, config.max_position_embeddings, torch.device(device))


def _write_tokenizer(folder: Path, num_tokens: int) -> None:
    """The tiny world's tokenizer with more pieces, which no text has."""
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"<piece{number}>": number for number in range(len(vocabulary), num_tokens)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_bytes((TINY / "tokenizer_config.json").read_bytes())


def words(num_tokens: int, number: int) -> str:
    """A text of this many tokens: each digit is one."""
    return f"{number:0{num_tokens}d}"


def write_rows(file: Path, num_rows: int, prompt: int, answer: int, first: int = 0) -> Path:
    """Conversations of one turn each: prompts and answers of these lengths in tokens, without the chat format."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": words(prompt, first + number)},
                {"role": "assistant", "content": words(answer, first + number)},
            ]
        }
        for number in range(num_rows)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_pairs(file: Path, num_rows: int, prompt: int, answer: int, first: int = 0) -> Path:
    """Pairs of answers of this length to prompts of that length, in tokens."""
    rows = [
        {
            "prompt": [{"role": "user", "content": words(prompt, first + number)}],
            "chosen": [{"role": "assistant", "content": words(answer, 2 * number)}],
            "rejected": [{"role": "assistant", "content": words(answer, 2 * number + 1)}],
        }
        for number in range(num_rows)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


if __name__ == "__main__":
    write_model(Path(sys.argv[2]), config_of(sys.argv[1]))
