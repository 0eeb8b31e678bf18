"""The Gemma 2 facts: the chat format token by token, the tokenizer's ids, the soft-caps, how models load."""

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from jinja2 import TemplateError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma2Config,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from trl import ModelConfig, SFTConfig, get_peft_config
from trl.chat_template_utils import gemma_chat_template

from gemma2_post.data.turns import InvalidRow, check_messages, fold_system
from gemma2_post.models.arguments import check_arguments, complete_model_arguments
from gemma2_post.models.loading import disable_cpu_repacking, load_config, load_model
from gemma2_post.models.saving import save_model
from gemma2_post.models.shapes import num_parameters
from gemma2_post.models.templates import INFERENCE_TEMPLATE, TRAINING_TEMPLATE, template_digest
from gemma2_post.models.tokenizer import load_tokenizer, render
from gemma2_post.stage import digests, launcher
from gemma2_post.stage.errors import UserError

SINGLE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Sure! "}]
MULTI = [*SINGLE, {"role": "user", "content": "What is 3 plus 5?"}, {"role": "assistant", "content": "It is 8."}]


@pytest.fixture(params=["tiny", "stand-in"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if request.param == "tiny":
        return tokenizer
    directory = request.getfixturevalue("real_data") / "tokenizer" / "standin-gemma2"
    config = Gemma2Config(vocab_size=2048)
    return load_tokenizer(str(directory), config)


def pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rendered_alone(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> dict[str, list[int]]:
    return {name: values[0].tolist() for name, values in render(tokenizer, [messages]).items()}


def test_a_single_turn_is_rendered_and_masked_token_by_token(any_tokenizer: PreTrainedTokenizerBase) -> None:
    user, sure = pieces(any_tokenizer, "user\nHi"), pieces(any_tokenizer, "Sure!")
    (newline,), model = pieces(any_tokenizer, "\n"), pieces(any_tokenizer, "model\n")
    rendered = rendered_alone(any_tokenizer, SINGLE)
    prompt = [2, 106, *user, 107, newline, 106, *model]
    assert rendered["input_ids"] == [*prompt, *sure, 107, 1]
    assert rendered["labels"] == [-100] * len(prompt) + [*sure, 107, 1]


def test_every_turn_of_the_model_has_loss_and_only_the_last_one_ends_with_eos(
    any_tokenizer: PreTrainedTokenizerBase,
) -> None:
    first = rendered_alone(any_tokenizer, SINGLE)
    rendered = rendered_alone(any_tokenizer, MULTI)
    length = len(first["input_ids"]) - 1  # the first turn without its <eos>
    assert rendered["input_ids"][:length] == first["input_ids"][:-1]
    assert rendered["labels"][:length] == first["labels"][:-1]
    (newline,), model = pieces(any_tokenizer, "\n"), pieces(any_tokenizer, "model\n")
    question, answer = pieces(any_tokenizer, "user\nWhat is 3 plus 5?"), pieces(any_tokenizer, "It is 8.")
    between = [newline, 106, *question, 107, newline, 106, *model]
    assert rendered["input_ids"][length:] == [*between, *answer, 107, 1]
    assert rendered["labels"][length:] == [-100] * len(between) + [*answer, 107, 1]
    assert rendered["input_ids"].count(2) == 1 and rendered["input_ids"].count(1) == 1


def test_training_text_begins_with_the_prompt_of_inference(any_tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = any_tokenizer.apply_chat_template(MULTI[:-1], add_generation_prompt=True)["input_ids"]
    assert rendered_alone(any_tokenizer, MULTI)["input_ids"][: len(prompt)] == prompt


def text_of(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], template: str, prompts: bool) -> str:
    """What a template renders; "refused" if it raises."""
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompts
        )
    except TemplateError:
        return "refused"


def alternates(messages: list[dict[str, str]]) -> bool:
    try:
        check_messages(messages, last=messages[-1]["role"])
    except InvalidRow:
        return False
    return True


CONVERSATIONS = [
    [{"role": role, "content": f" {role} {number}\n"} for number, role in enumerate(roles)]
    for length in range(1, 6)
    for roles in product(("system", "user", "assistant"), repeat=length)
]


@pytest.mark.parametrize("prompts", [True, False], ids=["prompts", "conversations"])
def test_without_a_system_message_the_saved_template_is_that_of_google(
    prompts: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    """It refuses the same, too: roles that do not alternate."""
    plain = [messages for messages in CONVERSATIONS if all(each["role"] != "system" for each in messages)]
    texts = [text_of(tokenizer, messages, INFERENCE_TEMPLATE, prompts) for messages in plain]
    assert texts == [text_of(tokenizer, messages, gemma_chat_template, prompts) for messages in plain]
    assert len(texts) == 62 and texts.count("refused") == 62 - 5


@pytest.mark.parametrize("prompts", [True, False], ids=["prompts", "conversations"])
def test_the_saved_template_folds_a_system_message_as_training_does(
    prompts: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    """And refuses what training refuses: none to fold it into, one in the middle, two of them."""
    num_folded = 0
    for messages in CONVERSATIONS:
        found = text_of(tokenizer, messages, INFERENCE_TEMPLATE, prompts)
        try:
            folded = fold_system(messages)
        except InvalidRow:
            folded = []
        if folded and alternates(folded):
            assert found == text_of(tokenizer, folded, gemma_chat_template, prompts)
            num_folded += folded is not messages
        else:
            assert found == "refused"
    assert num_folded == 4


@pytest.mark.parametrize("system", ["Be brief.", "", " \n ", " Two\n\nlines \n"])
def test_a_system_message_reads_in_training_as_at_inference(system: str, tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": system}, *MULTI]
    training = rendered_alone(tokenizer, fold_system(messages))["input_ids"]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert training[: len(prompt)] == prompt and prompt.count(2) == 1


def test_an_answer_can_be_continued_behind_a_system_message(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *SINGLE]
    text = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert text == ("<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nSure!")


def test_models_with_the_template_of_google_count_as_of_the_same_format() -> None:
    """Version 0.1.0 saved it: reward models sealed with it, and policies to merge, stay of use."""
    assert template_digest(INFERENCE_TEMPLATE) == template_digest(gemma_chat_template)
    assert template_digest(gemma_chat_template) == digests.of_text(gemma_chat_template)
    assert template_digest(TRAINING_TEMPLATE) != template_digest(INFERENCE_TEMPLATE)


def test_the_teacher_ships_with_the_saved_template() -> None:
    assert Path("gemma2_post/tiny/models/teacher/chat_template.jinja").read_text() == INFERENCE_TEMPLATE


def test_the_cropped_gemma_tokenizer_renders_its_golden_ids(real_data: Path) -> None:
    """The real normaliser and the real template, on a cropped vocabulary."""
    folder = real_data / "tokenizer" / "standin-gemma2"
    golden = json.loads((folder / "gemma_golden_ids.json").read_text())
    cropped = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer_gemma_cropped.json"), bos_token="<bos>")
    assert json.loads((folder / "tokenizer_config_gemma.json").read_text())["chat_template"] == gemma_chat_template
    chat = golden["cropped_chat"]
    rendered = cropped.apply_chat_template(
        chat["messages"], chat_template=gemma_chat_template, add_generation_prompt=True
    )
    assert rendered["input_ids"][: len(chat["ids_prefix"])] == chat["ids_prefix"]


def test_the_stand_in_tokenizer_gives_the_published_ids_of_gemma(real_data: Path) -> None:
    """Those of the golden vectors whose ids are all below 473, where the stand-in is Gemma's own vocabulary."""
    folder = real_data / "tokenizer" / "standin-gemma2"
    standin = load_tokenizer(str(folder), Gemma2Config(vocab_size=2048))
    vectors = json.loads((folder / "gemma_golden_ids.json").read_text())["encode"]
    vectors = [vector for vector in vectors if max(vector["ids"]) < 473]
    assert len(vectors) == 4
    for vector in vectors:
        assert standin(vector["text"], add_special_tokens=vector["add_bos"])["input_ids"] == vector["ids"]


def test_a_tokenizer_without_its_file_is_refused_before_transformers_makes_one_up(
    model_dir: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(model_dir, tmp_path / "broken")
    (broken / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        load_tokenizer(str(broken), load_config(str(broken)))


def test_a_tokenizer_of_another_vocabulary_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 1024 tokens and the model 2048"):
        load_tokenizer(str(model_dir), Gemma2Config(vocab_size=2048))
    moved = shutil.copytree(model_dir, tmp_path / "moved")
    text = (moved / "tokenizer.json").read_text()
    for old, new in (("<end_of_turn>", "<swap>"), ("<unused7>", "<end_of_turn>"), ("<swap>", "<unused7>")):
        text = text.replace(f'"{old}"', f'"{new}"')
    (moved / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="<end_of_turn> at id 11, not 107"):
        load_tokenizer(str(moved), load_config(str(moved)))


def as_plain_pieces(tokenizer: dict, settings: dict) -> None:
    """The turn tokens stay in the vocabulary, but are no added tokens any more."""
    tokenizer["added_tokens"] = [each for each in tokenizer["added_tokens"] if "_of_turn" not in each["content"]]
    del settings["additional_special_tokens"], settings["added_tokens_decoder"]


def stripping(tokenizer: dict, settings: dict) -> None:
    """`<end_of_turn>` swallows the newline behind it."""
    for each in tokenizer["added_tokens"]:
        each["rstrip"] = each["content"] == "<end_of_turn>"
    del settings["additional_special_tokens"], settings["added_tokens_decoder"]


UNREADABLE = {
    "no added token": (
        as_plain_pieces,
        r"reads '\\n<start_of_turn>\\n' as '\\n' '<' .* '>' '\\n', not as '\\n' '<start_of_turn>' '\\n'; copy",
    ),
    "a token that strips": (
        stripping,
        r"reads '\\n<end_of_turn>\\n' as '\\n' '<end_of_turn>', not as '\\n' '<end_of_turn>' '\\n'; copy",
    ),
}


@pytest.mark.parametrize(("change", "message"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_tokenizer_that_reads_a_control_token_as_pieces_is_refused_before_training(
    change: Callable[[dict, dict], None],
    message: str,
    model_dir: Path,
    tmp_path: Path,
    recipe: dict[str, object],
    run_sft: Callable[[dict[str, object]], Path],
) -> None:
    """Its vocabulary is Gemma's, with every token at its id, so nothing else would notice."""
    broken = shutil.copytree(model_dir, tmp_path / "broken")
    contents = {name: json.loads((broken / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")}
    change(*contents.values())
    for name, content in contents.items():
        (broken / name).write_text(json.dumps(content))
    vocabulary = AutoTokenizer.from_pretrained(broken).get_vocab()
    assert (vocabulary["<start_of_turn>"], vocabulary["<end_of_turn>"]) == (106, 107)
    with pytest.raises(UserError, match=message) as refused:
        run_sft(recipe | {"model_name_or_path": str(broken)})
    assert "copy tokenizer.json and tokenizer_config.json of the base model" in str(refused.value)


def test_an_adapter_another_architecture_and_an_unknown_model_are_refused(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter, not a model"):
        load_config(str(tmp_path))
    other = shutil.copytree(model_dir, tmp_path / "other")
    (other / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="is a llama model"):
        load_config(str(other))
    with pytest.raises(UserError, match=r"accept its license at https://huggingface\.co/google/gemma-2-2b"):
        load_config("google/gemma-2-2b")


@pytest.mark.slow
def test_the_attention_soft_cap_is_real(model_dir: Path) -> None:
    """With large scores, eager attention without the cap gives other logits; flex_attention with it, the same."""
    ids = torch.arange(110, 140)[None]

    def logits(cap: float | None, implementation: str) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation=implementation, attn_logit_softcapping=cap
        )
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight *= 8
            return model(ids).logits

    capped = logits(50.0, "eager")
    assert (capped - logits(None, "eager")).abs().max() > 0.01
    torch.testing.assert_close(logits(50.0, "flex_attention"), capped, atol=1e-4, rtol=1e-4)


def test_gradients_of_a_4bit_model_survive_an_evaluation_forward(model_dir: Path) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes repacks weights in evaluation mode: later gradients are wrong."""
    model = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype=torch.bfloat16,
        attn_implementation="eager",
        device_map="cpu",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )
    disable_cpu_repacking(model)
    embedded = model.get_input_embeddings()(torch.arange(110, 140)[None]).detach().requires_grad_()

    def gradient() -> torch.Tensor:
        model.train()
        return torch.autograd.grad(model(inputs_embeds=embedded).logits.float().pow(2).sum(), embedded)[0]

    before = gradient()
    with torch.no_grad():
        model.eval()(inputs_embeds=embedded)
    assert torch.equal(gradient(), before)


def test_parameters_are_counted_from_the_config(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    assert num_parameters(model.config) == sum(parameter.numel() for parameter in model.parameters())


REFUSALS = {
    "sdpa": ({"attn_implementation": "sdpa"}, {}, "cannot apply Gemma 2's attention soft-cap"),
    "fp16 weights": ({"dtype": "float16"}, {}, "write bfloat16 or float32"),
    "4-bit full fine-tuning": ({"load_in_4bit": True, "dtype": "bfloat16"}, {}, "load_in_4bit is for adapters"),
    "fp32 with a 4-bit base": (
        {"load_in_4bit": True, "use_peft": True},
        {},
        "dtype is float32 with quantized weights",
    ),
    "pure bf16": ({"dtype": "bfloat16"}, {}, "small updates are rounded away"),
    "adapting the head": (
        {"use_peft": True, "lora_target_modules": ["q_proj", "lm_head"]},
        {},
        "lm_head cannot be adapted",
    ),
    "flash attention that is not there": ({"attn_implementation": "flash_attention_2"}, {}, "flash-attn package"),
}


@pytest.mark.parametrize(("model", "training", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_combinations_that_cannot_work_are_refused_with_the_remedy(
    model: dict, training: dict, message: str, tmp_path: Path
) -> None:
    model_args = ModelConfig(model_name_or_path="google/gemma-2-2b", **model)
    training_args = SFTConfig(str(tmp_path), use_cpu=True, **training)
    with pytest.raises(UserError, match=message):
        check_arguments(launcher.of_this_process(training_args), model_args, training_args)


def test_lora_is_on_q_k_v_o_unless_the_recipe_names_others(tmp_path: Path) -> None:
    model_args = ModelConfig(
        model_name_or_path="google/gemma-2-2b", use_peft=True, dtype="bfloat16", load_in_4bit=True
    )
    training_args = SFTConfig(str(tmp_path), use_cpu=True)
    check_arguments(launcher.of_this_process(training_args), model_args, training_args)
    complete_model_arguments(model_args)
    assert get_peft_config(model_args).target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert model_args.attn_implementation == "eager"


def test_fp16_does_not_come_in_through_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    model_args = ModelConfig(model_name_or_path="google/gemma-2-2b")
    training_args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(UserError, match="bf16 is false, but accelerate was started with mixed precision fp16"):
        check_arguments(launcher.of_this_process(training_args), model_args, training_args)


def test_a_directory_that_cannot_be_loaded_is_not_mistaken_for_a_gated_model(model_dir: Path, tmp_path: Path) -> None:
    empty = shutil.copytree(model_dir, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match="cannot be loaded") as refused:
        load_model(ModelConfig(model_name_or_path=str(empty)), SFTConfig(str(tmp_path), use_cpu=True))
    assert "huggingface.co" not in str(refused.value)


def test_a_head_that_training_untied_is_not_saved_in_silence(model_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    state_dict = dict(model.state_dict())
    state_dict["lm_head.weight"] = state_dict["lm_head.weight"] + 1
    with pytest.raises(RuntimeError, match="lm_head and embed_tokens differ"):
        save_model(model, state_dict, tmp_path, torch.float32)


def test_what_is_saved_tokenizes_and_renders_as_before(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab() and again.chat_template == tokenizer.chat_template
    assert again("Anna, what is 12?")["input_ids"] == tokenizer("Anna, what is 12?")["input_ids"]
