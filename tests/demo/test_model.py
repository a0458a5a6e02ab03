import json
import math

import jinja2
import numpy as np
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from relaxlm.demo import MODEL_DIR
from relaxlm.demo.world import BRIEF, held_out_questions, held_out_texts, training_conversations

CHAT = [
    {"role": "system", "content": BRIEF},
    {"role": "user", "content": "Where does Zoë live?"},
    {"role": "assistant", "content": "At the café."},
    {"role": "user", "content": "And Mia?"},
]
RENDERED = (
    "<|im_start|>system\nAnswer in as few words as possible.<|im_end|>\n"
    "<|im_start|>user\nWhere does Zoë live?<|im_end|>\n"
    "<|im_start|>assistant\nAt the café.<|im_end|>\n"
    "<|im_start|>user\nAnd Mia?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def read(name: str) -> dict:
    return json.loads((MODEL_DIR / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


def template() -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(read("tokenizer_config.json")["chat_template"])


def test_the_folder_is_a_small_hugging_face_folder() -> None:
    assert sorted(path.name for path in MODEL_DIR.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    ]
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 4_000_000


def test_the_weights_are_float16_and_finite() -> None:
    config, weights = read("config.json"), load_file(MODEL_DIR / "model.safetensors")
    assert config["model_type"] == "llama" and config["tie_word_embeddings"] is True
    assert config["num_attention_heads"] == 2 * config["num_key_value_heads"]
    assert "lm_head.weight" not in weights
    assert sum(w.size for w in weights.values()) == read("training.json")["parameters"]
    for name, weight in weights.items():
        assert weight.dtype == np.float16 and np.isfinite(weight).all(), name
        assert weight.shape[-1] % 32 == 0, name


def test_the_configs_name_the_tokens_of_the_tokenizer(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == read("config.json")["vocab_size"]
    generation, settings = read("generation_config.json"), read("tokenizer_config.json")
    stops = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert generation["eos_token_id"] == stops
    assert settings["eos_token"] == "<|im_end|>"
    for key, token in settings["added_tokens_decoder"].items():
        assert tokenizer.id_to_token(int(key)) == token["content"]


def test_text_survives_encoding_and_decoding(tokenizer: Tokenizer) -> None:
    chat = next(training_conversations(3))
    for text in ("Zoë, crème brûlée 🙂", " two  spaces\n\n", "日本 ±", chat[-1]["content"]):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_digits_and_bytes_outside_ascii_are_tokens_of_their_own(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("2345").tokens == ["2", "3", "4", "5"]
    assert len(tokenizer.encode("ë").ids) == 2
    assert len(tokenizer.encode("🙂").ids) == 4


def test_chat_template() -> None:
    assert template().render(messages=CHAT, add_generation_prompt=True) == RENDERED
    short = RENDERED.removesuffix("<|im_start|>assistant\n")
    assert template().render(messages=CHAT) == short
    assert template().render(messages=CHAT[1:]) == short[short.index("<|im_start|>user") :]


@pytest.mark.parametrize(
    "messages, message",
    [
        ([CHAT[1], CHAT[0]], "The system message must come first."),
        ([{"role": "tool", "content": "2"}], "Unknown role: tool"),
    ],
)
def test_chat_template_refuses(messages: list[dict[str, str]], message: str) -> None:
    with pytest.raises(jinja2.TemplateError) as error:
        template().render(messages=messages)
    assert str(error.value) == message


@pytest.mark.slow
def test_the_model_is_as_good_as_training_json_says(tokenizer: Tokenizer) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tools.train_demo import evaluate, text_loss

    stated = read("training.json")
    assert stated["held_out_questions"] == len(held_out_questions())
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    right = evaluate(model, tokenizer, held_out_questions()[:60])
    # Two questions of the sixty may be worse luck than the whole set's.
    assert right["all"] >= stated["held_out_accuracy"]["all"] - 2 / 60
    loss = text_loss(model, tokenizer, held_out_texts()[:10])
    assert math.isclose(loss, stated["held_out_text_loss"], rel_tol=0.1)


def test_training_sees_the_tokens_that_the_template_gives(tokenizer: Tokenizer) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import random

    from tools.train_demo import encode_chat, render

    theirs = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    assert theirs.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False) == RENDERED
    assert render(tuple(CHAT)) == RENDERED
    chats = training_conversations(5)
    for chat in (next(chats) for _ in range(20)):
        ids, weights, positions = encode_chat(tokenizer, chat, random.Random(0))
        text = template().render(messages=chat)
        assert theirs.apply_chat_template(chat, tokenize=False) == text
        assert tokenizer.encode(text).ids == ids
        assert len(weights) == len(positions) == len(ids)
        assert sorted(set(positions)) == positions and positions[-1] < 1024
