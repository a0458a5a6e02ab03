import json
from pathlib import Path
from typing import Any

import pytest

from relaxlm.compiler.gen_config import generate_config
from relaxlm.errors import (
    ConfigError,
    RelaxLMError,
    TemplateError,
    TokenizerError,
    UnsupportedError,
)
from relaxlm.models import load_config
from relaxlm.runtime.chat_config import ChatConfigFile
from relaxlm.runtime.conv_template_table import CONV_TEMPLATES
from relaxlm.runtime.prompt import PromptBuilder
from relaxlm.runtime.tokenizer import Tokenizer
from tests.runtime.tokenizer_samples import (
    CHATML,
    LFS_POINTER,
    LLAMA_CONFIG,
    byte_level_json,
    model_folder,
)

CHAT = [
    {"role": "system", "content": "Be terse."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3?"},
]


def generated(folder: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """The written file, and the notes."""
    notes: list[str] = []
    path = generate_config(folder, "q4f16_1", folder.parent / "out", note=notes.append, **options)
    assert path == folder.parent / "out" / "mlc-chat-config.json"
    return json.loads(path.read_text("utf-8")), notes


def test_the_whole_file(tmp_path: Path) -> None:
    folder = model_folder(
        tmp_path / "model",
        generation_config__json={
            "temperature": 0.6,
            "top_p": 0.9,
            "top_k": 20,
            "eos_token_id": [2, 0],
            "do_sample": True,
        },
        special_tokens_map__json={"unk_token": "<|endoftext|>"},
    )
    config, notes = generated(folder)
    template = config.pop("conv_template")
    assert config == {
        "version": "0.1.0",
        "model_type": "llama",
        "quantization": "q4f16_1",
        "model_config": {
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "head_dim": 8,
            "context_window_size": 4096,
            "sliding_window_size": -1,
            "prefill_chunk_size": 2048,
            "attention_sink_size": -1,
            "tensor_parallel_shards": 1,
            "pipeline_parallel_stages": 1,
            "max_batch_size": 128,
            "disaggregation": False,
        },
        "vocab_size": 320,
        "context_window_size": 4096,
        "sliding_window_size": -1,
        "prefill_chunk_size": 2048,
        "attention_sink_size": -1,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "active_vocab_size": 300,
        "temperature": 0.6,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "top_p": 0.9,
        "tokenizer_files": ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"],
        "tokenizer_info": {
            "token_postproc_method": "byte_level",
            "prepend_space_in_encode": False,
            "strip_space_in_decode": False,
        },
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": [2, 0],
        "model_task": "chat",
        "embedding_metadata": None,
        "relaxlm": {
            "chat_template": CHATML,
            "special_tokens": {
                "eos_token": "<|im_end|>",
                "unk_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
            },
            "top_k": 20,
        },
    }
    assert template["name"] == "chatml"
    assert template["stop_token_ids"] == [2, 0]
    assert notes == [
        "prompts are written by the model's own chat template; conv_template, for other tools, is "
        "chatml, which writes 1 of 3 test conversations alike"
    ]
    for name in config["tokenizer_files"]:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_the_result_says_the_same_of_the_model_as_its_source(tmp_path: Path) -> None:
    for i, changes in enumerate(
        [
            {},
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "num_key_value_heads": None},
            {
                "rope_theta": None,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 1024,
                },
            },
            {"model_type": "mistral", "sliding_window": 512},
            {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 512},
            {"model_type": "qwen3", "attention_bias": False, "head_dim": 16},
        ]
    ):
        folder = model_folder(tmp_path / str(i) / "model", config__json={**LLAMA_CONFIG, **changes})
        config, _ = generated(folder)
        assert load_config(tmp_path / str(i) / "out") == load_config(folder)
        window = 512 if changes.get("model_type") == "mistral" else -1
        assert config["sliding_window_size"] == window
        if "rope_parameters" in changes:
            assert config["model_config"]["rope_theta"] == 5e5
            assert config["model_config"]["rope_scaling"]["factor"] == 8.0


def test_sizes_can_be_chosen(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    sizes = {
        "context_window_size": 8192,
        "sliding_window_size": 1024,
        "attention_sink_size": 4,
        "prefill_chunk_size": 512,
    }
    config, notes = generated(folder, **sizes, max_batch_size=3, tensor_parallel_shards=1)
    assert {key: config[key] for key in sizes} == sizes
    assert {key: config["model_config"][key] for key in sizes} == sizes
    assert config["model_config"]["max_batch_size"] == 3
    assert notes[0] == (
        "context_window_size = 8192 is more than the 4096 positions that the model was trained for "
        f"(max_position_embeddings in {folder}/config.json); answers may be poor beyond them"
    )
    config, _ = generated(folder, context_window_size=100)
    assert (config["prefill_chunk_size"], config["attention_sink_size"]) == (100, -1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"tensor_parallel_shards": 2},
            "tensor_parallel_shards = 2 is not supported: expected 1. relaxlm runs a model on one "
            "device.",
        ),
        ({"context_window_size": 0}, "context_window_size = 0: expected a number of at least 1"),
        ({"max_batch_size": -1}, "max_batch_size = -1: expected a number of at least 1"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size = 0: expected a number of at least 1"),
        (
            {"prefill_chunk_size": 200, "context_window_size": 100},
            "prefill_chunk_size = 200: expected at most context_window_size = 100",
        ),
        (
            {"sliding_window_size": 0},
            "sliding_window_size = 0: expected a number of at least 1, or -1 for no window",
        ),
        (
            {"attention_sink_size": 4},
            "attention_sink_size = 4 needs a sliding window: set sliding_window_size too",
        ),
        (
            {"attention_sink_size": 64, "sliding_window_size": 64},
            "attention_sink_size = 64: expected at least 0 and less than sliding_window_size = 64",
        ),
        (
            {"conv_template": "lama-2"},
            "conversation template 'lama-2' is not known. Known are: " + ", ".join(CONV_TEMPLATES),
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_do_not_fit(options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    with pytest.raises(ConfigError) as caught:
        generate_config(folder, "q4f16_1", tmp_path / "out", **options)
    assert str(caught.value) == expected
    assert isinstance(caught.value, UnsupportedError) == ("tensor_parallel_shards" in options)
    assert not (tmp_path / "out").exists()


def test_a_named_template_takes_the_chat_template_s_place(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    config, notes = generated(folder, conv_template="qwen2")
    assert "relaxlm" not in config
    assert config["conv_template"]["name"] == "qwen2"
    assert config["conv_template"]["stop_token_ids"] == [0, 2]
    assert notes == []
    out = tmp_path / "out"
    builder = PromptBuilder(ChatConfigFile.load(out), Tokenizer.load(out))
    assert builder.text(CHAT[1:2]).startswith("<|im_start|>system\nYou are a helpful assistant.")


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", tokenizer_config__json={"eos_token": "<|endoftext|>"})
    config, notes = generated(folder)
    assert config["conv_template"]["name"] == "LM"
    assert config["eos_token_id"] == 0
    assert notes == [
        "the model has no chat template, so messages are continued as plain text (LM). If it is a "
        "chat model, name its format with --conv-template; of llama there are llama-2, llama-3, "
        "llama-3_1, vicuna_v1.1, tinyllama_v1_0, chatml"
    ]


def test_several_chat_templates_are_kept(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", chat_template__jinja=CHATML)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools[0].name }}")
    generated(folder)
    config = ChatConfigFile.load(tmp_path / "out")
    assert config.chat_templates == {"default": CHATML, "tool_use": "{{ tools[0].name }}"}


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [
        ({}, {}, {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}),
        ({"temperature": None}, {"temperature": 0.3}, {"temperature": 0.3}),
        ({"temperature": 0.7}, {"temperature": 0.3, "top_p": 0.5}, {"top_p": 0.5}),
        ({"do_sample": False, "temperature": 0.7}, {}, {"temperature": 0.0}),
        ({"repetition_penalty": 1.05}, {}, {"repetition_penalty": 1.05}),
        ({}, {"eos_token_id": 7, "bos_token_id": 5}, {"eos_token_id": 7, "bos_token_id": 5}),
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, {"eos_token_id": [7, 8]}),
        ({}, {}, {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}),
        ({"pad_token_id": 9}, {"pad_token_id": 8}, {"pad_token_id": 9}),
    ],
)
def test_where_defaults_come_from(
    generation: dict[str, Any], model: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    folder = model_folder(
        tmp_path / "model",
        generation_config__json=generation,
        config__json={**LLAMA_CONFIG, **model},
    )
    config, _ = generated(folder)
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("files", "error", "expected"),
    [
        (
            {"tokenizer__json": LFS_POINTER},
            TokenizerError,
            "{folder}/tokenizer.json is a Git LFS pointer, not tokenizer.json (132 bytes): "
            "run `git lfs "
            "pull` in {folder}, or download the file again",
        ),
        (
            {"tokenizer__json": b"{"},
            TokenizerError,
            "{folder}/tokenizer.json: not valid JSON: Expecting property name enclosed in double "
            "quotes at line 1, column 2. Is the file complete?",
        ),
        (
            {"tokenizer__json": None},
            TokenizerError,
            "{folder}: no tokenizer. Expected tokenizer.json, tokenizer.model, vocab.json with "
            "merges.txt, tekken.json or rwkv_vocab_*.txt. Download the tokenizer files of the "
            "model into this folder.",
        ),
        (
            {"tokenizer__json": None, "tokenizer__model": b"junk"},
            TokenizerError,
            "{folder}/tokenizer.model: not a SentencePiece model, or cut off: 117 bytes "
            "expected at "
            "byte 2, 2 are there. Download the file again.",
        ),
        (
            {"tokenizer__json": None, "rwkv_vocab_v20230424__txt": "1 'a' 1"},
            TokenizerError,
            "{folder}/rwkv_vocab_v20230424.txt: 255 bytes are no tokens, such as 0, so not every "
            "text can be cut. Is the file complete?",
        ),
        (
            {"tokenizer__json": None, "qwen__tiktoken": "junk"},
            TokenizerError,
            "{folder}/qwen.tiktoken: line 1 is not a token in base64 and its rank",
        ),
        (
            {"tokenizer_config__json": "{]"},
            TokenizerError,
            "{folder}/tokenizer_config.json: not valid JSON: Expecting property name enclosed in "
            "double quotes at line 1, column 2. Is the file complete?",
        ),
        (
            {"generation_config__json": {"temperature": "hot"}},
            ConfigError,
            "{folder}/generation_config.json: temperature = 'hot': expected a number",
        ),
        (
            {"generation_config__json": {"eos_token_id": "</s>"}},
            ConfigError,
            "{folder}/generation_config.json: eos_token_id = '</s>': expected a token id or a list "
            "of them",
        ),
        (
            {"generation_config__json": {"top_p": 3}},
            ConfigError,
            "{out}/mlc-chat-config.json: top_p = 3: Input should be less than or equal to 1",
        ),
        (
            {"chat_template__jinja": "{% if %}"},
            TemplateError,
            "{folder}: chat template 'default': line 1: not valid Jinja: Expected an expression, "
            "got 'end of statement block'",
        ),
        (
            {"config__json": {**LLAMA_CONFIG, "model_type": "mamba"}},
            UnsupportedError,
            "{folder}/config.json: model_type 'mamba' is not supported. Supported: ",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_folders_that_cannot_be_read(
    files: dict[str, Any], error: type[RelaxLMError], expected: str, tmp_path: Path
) -> None:
    folder = model_folder(tmp_path / "model", **files)
    with pytest.raises(error) as caught:
        generate_config(folder, "q4f16_1", tmp_path / "out")
    wanted = expected.format(folder=folder, out=tmp_path / "out")
    assert str(caught.value)[: len(wanted)] == wanted
    assert error is UnsupportedError or str(caught.value) == wanted
    assert not (tmp_path / "out").exists()


def test_duplicate_added_tokens_are_refused(tmp_path: Path) -> None:
    content = json.loads(byte_level_json())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 300})
    folder = model_folder(tmp_path / "model", tokenizer__json=content)
    with pytest.raises(TokenizerError, match=r"2 added tokens have the content '<\|endoftext\|>'"):
        generate_config(folder, "q4f16_1", tmp_path / "out")


def test_an_unknown_preset(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantization 'q5f16_9' is not known"):
        generate_config(model_folder(tmp_path / "model"), "q5f16_9", tmp_path / "out")


def test_a_tokenizer_that_is_larger_than_the_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", config__json={**LLAMA_CONFIG, "vocab_size": 280})
    config, notes = generated(folder)
    assert config["active_vocab_size"] == 280
    assert notes[0] == (
        "the tokenizer has 300 tokens, the model 280: the tokens beyond cannot be used"
    )


def test_two_runs_write_the_same_bytes_and_nothing_else(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    first = generate_config(folder, "q4f16_1", tmp_path / "a")
    second = generate_config(folder / "config.json", "q4f16_1", tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    names = {"mlc-chat-config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names


def test_a_date_is_not_frozen_in_the_file(tmp_path: Path) -> None:
    dated = "<|im_start|>system\nToday is {{ strftime_now('%d %B %Y') }}.<|im_end|>\n" + CHATML
    config, _ = generated(model_folder(tmp_path / "a" / "model", chat_template__jinja=dated))
    assert "Today" not in config["conv_template"]["system_message"]
    plain = "<|im_start|>system\nToday is a day.<|im_end|>\n" + CHATML
    config, _ = generated(model_folder(tmp_path / "b" / "model", chat_template__jinja=plain))
    assert config["conv_template"]["system_message"] == "Today is a day."
