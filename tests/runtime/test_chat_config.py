import json
from pathlib import Path
from typing import Any

import pytest

from relaxlm import files
from relaxlm.errors import ConfigError
from relaxlm.runtime.chat_config import LEGACY_KEYS, ChatConfigFile
from relaxlm.runtime.conv_templates import ConvTemplate
from relaxlm.runtime.tokenizer import Tokenizer
from tests.runtime.tokenizer_samples import LFS_POINTER, byte_level_json, write_json

# As the ecosystem's current release writes it.
CURRENT: dict[str, Any] = {
    "version": "0.1.0",
    "model_type": "qwen2",
    "quantization": "q4f16_1",
    "model_config": {
        "hidden_act": "silu",
        "hidden_size": 896,
        "num_attention_heads": 14,
        "rope_theta": 1000000.0,
        "context_window_size": 4096,
        "prefill_chunk_size": 2048,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "max_batch_size": 128,
        "disaggregation": False,
    },
    "vocab_size": 151936,
    "context_window_size": 4096,
    "sliding_window_size": 1024,
    "prefill_chunk_size": 2048,
    "attention_sink_size": 4,
    "tensor_parallel_shards": 1,
    "pipeline_parallel_stages": 1,
    "active_vocab_size": 151665,
    "temperature": 0.7,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.2,
    "repetition_penalty": 1.1,
    "top_p": 0.8,
    "tokenizer_files": ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"],
    "tokenizer_info": {
        "token_postproc_method": "byte_level",
        "prepend_space_in_encode": False,
        "strip_space_in_decode": True,
    },
    "conv_template": {
        "name": "qwen2",
        "system_template": "<|im_start|>system\n{system_message}<|im_end|>\n",
        "system_message": "You are a helpful assistant.",
        "system_prefix_token_ids": [5],
        "add_role_after_system_message": True,
        "roles": {"user": "<|im_start|>user", "assistant": "<|im_start|>assistant", "tool": "t"},
        "role_templates": {
            "user": "{user_message}",
            "assistant": "{assistant_message}",
            "tool": "{tool_message}",
        },
        "messages": [["user", "Hi"]],
        "seps": ["<|im_end|>\n"],
        "role_content_sep": "\n",
        "role_empty_sep": "\n",
        "stop_str": ["<|endoftext|>", "<|im_end|>"],
        "stop_token_ids": [151643, 151645],
        "strip_reasoning_in_history": True,
        "function_string": "f",
        "use_function_calling": True,
    },
    "pad_token_id": 151643,
    "bos_token_id": 151642,
    "eos_token_id": [151645, 151643],
    "model_task": "chat",
    "embedding_metadata": {"model_type": "encoder", "pooling_strategy": "cls", "normalize": True},
}


def test_every_key_survives_reading_and_writing(tmp_path: Path) -> None:
    write_json(tmp_path / "mlc-chat-config.json", CURRENT)
    config = ChatConfigFile.load(tmp_path)
    assert config.architecture["hidden_size"] == 896
    assert config.eos_token_ids == [151645, 151643]
    (tmp_path / "copy").mkdir()
    path = config.save(tmp_path / "copy")
    assert json.loads(path.read_text("utf-8")) == CURRENT
    assert ChatConfigFile.load(path) == config
    assert [file.name for file in (tmp_path / "copy").iterdir()] == ["mlc-chat-config.json"]


def test_our_section_is_written_only_if_it_says_something(tmp_path: Path) -> None:
    section = {"chat_template": "{{ messages }}", "special_tokens": {"bos_token": "ß"}, "top_k": 20}
    config = ChatConfigFile.parse(CURRENT | {"relaxlm": section})
    assert config.as_json() == CURRENT | {"relaxlm": section}
    assert config.chat_templates == {"default": "{{ messages }}"}
    assert ChatConfigFile.parse(CURRENT).chat_templates == {}
    text = config.save(tmp_path).read_text("utf-8")
    assert "ß" in text
    assert text.endswith("}\n")


def test_a_folder_of_early_2024() -> None:
    old = {
        "model_type": "gpt_neox",
        "quantization": "q4f16_1",
        "model_config": {
            "hidden_size": 2560,
            "vocab_size": 50432,
            "context_window_size": 2048,
            "prefill_chunk_size": 1024,
        },
        "sliding_window_size": -1,
        "mean_gen_len": 128,
        "max_gen_len": 512,
        "shift_fill_factor": 0.3,
        "model_lib": "RedPajama-q4f16_1",
        "model_name": "RedPajama",
        "temperature": 0.7,
        "conv_template": "redpajama_chat",
        "conv_config": {"seps": ["\n\n"]},
        "token_table_postproc_method": "byte_level",
        "embedding_metadata": None,
        "eos_token_id": 0,
        "version": "0.1.0",
    }
    config = ChatConfigFile.parse(old)
    assert (config.vocab_size, config.active_vocab_size) == (50432, 50432)
    assert (config.context_window_size, config.prefill_chunk_size) == (2048, 1024)
    assert (config.top_p, config.eos_token_ids) == (1.0, [0])
    assert config.tokenizer_info.token_postproc_method == "byte_level"
    assert list(config.legacy) == [
        "mean_gen_len",
        "max_gen_len",
        "shift_fill_factor",
        "model_lib",
        "model_name",
        "conv_config",
        "token_table_postproc_method",
    ]
    assert config.legacy["max_gen_len"] == 512
    template = config.conversation(Tokenizer(byte_level_json().encode()))
    assert template is not None
    assert (template.name, template.seps, template.stop_token_ids) == (
        "redpajama_chat",
        ["\n\n"],
        [0],
    )


def test_keys_that_were_renamed() -> None:
    old = {
        "model_category": "llama",
        "quantization": "q4f16_1",
        "model_config": {},
        "vocab_size": 32000,
        "num_shards": 2,
        "max_window_size": 768,
        "sliding_window": 512,
    }
    config = ChatConfigFile.parse(old)
    assert (config.model_type, config.tensor_parallel_shards) == ("llama", 2)
    assert (config.context_window_size, config.prefill_chunk_size) == (768, 768)
    assert config.sliding_window_size == 512
    assert set(config.legacy) <= set(LEGACY_KEYS)
    assert not set(config.as_json()) & set(LEGACY_KEYS)


def test_a_template_without_the_newer_keys() -> None:
    early = {"name": "x", "roles": {"user": "U", "assistant": "A"}, "seps": ["\n"]}
    config = ChatConfigFile.parse(CURRENT | {"conv_template": early})
    assert isinstance(config.conv_template, ConvTemplate)
    assert config.conv_template.role_templates["user"] == "{user_message}"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"temprature": 1, "foo": 2}, "unknown: temprature, foo"),
        ({"quantization": None, "vocab_size": None}, "missing: quantization, vocab_size"),
        (
            {"temperature": "hot"},
            "temperature = 'hot': Input should be a valid number, unable to parse string as a "
            "number",
        ),
        ({"top_p": 1.5}, "top_p = 1.5: Input should be less than or equal to 1"),
        (
            {"model_task": "sing"},
            "model_task = 'sing': Input should be 'chat' or 'embedding'",
        ),
        (
            {"conv_template": CURRENT["conv_template"] | {"separator": "x"}},
            "unknown: conv_template.separator",
        ),
        (
            {"conv_template": CURRENT["conv_template"] | {"seps": []}},
            "conv_template.seps = []: List should have at least 1 item after validation, not 0",
        ),
        ({"conv_template": {"seps": ["a"]}}, "missing: conv_template.roles"),
        (
            {"conv_template": {"seps": ["a"], "roles": {"user": "u"}}},
            "conv_template.roles = {'user': 'u'}: Value error, no role named assistant",
        ),
        (
            {"eos_token_id": "</s>"},
            "eos_token_id = '</s>': Input should be a valid integer, unable to parse string as an "
            "integer",
        ),
        ({"tokenizer_info": {"x": 1}}, "unknown: tokenizer_info.x"),
        ({"relaxlm": {"chat_templ": "x"}}, "unknown: relaxlm.chat_templ"),
    ],
)
def test_keys_and_values_that_do_not_fit(
    change: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "mlc-chat-config.json"
    write_json(path, CURRENT | change)
    with pytest.raises(ConfigError) as caught:
        ChatConfigFile.load(tmp_path)
    assert str(caught.value) == f"{path}: {expected}"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "mlc-chat-config.json"

    def message() -> str:
        with pytest.raises(ConfigError) as caught:
            ChatConfigFile.load(tmp_path)
        return str(caught.value)

    assert message() == (
        f"{path}: no such file. `relaxlm gen_config` writes it into a converted model's folder."
    )
    path.write_text('{"version": "0.1.0"')
    assert message() == (
        f"{path}: not valid JSON: Expecting ',' delimiter at line 1, column 20. Is the file "
        "complete?"
    )
    path.write_bytes(LFS_POINTER)
    assert message() == (
        f"{path} is a Git LFS pointer, not mlc-chat-config.json (132 bytes): run `git lfs pull` in "
        f"{tmp_path}, or download the file again"
    )
    for value, found in [
        ("null", "null"),
        ("true", "a boolean"),
        ("1", "a number"),
        ('""', "a string"),
    ]:
        path.write_text(value)
        assert message() == f"{path}: expected a JSON object, found {found}"


def test_an_unknown_template_name() -> None:
    with pytest.raises(ConfigError, match="conversation template 'llama-22' is not known"):
        ChatConfigFile.parse(CURRENT | {"conv_template": "llama-22"})


def test_changes_that_do_not_fit_the_template() -> None:
    config = ChatConfigFile.parse(CURRENT | {"conv_config": {"separator_style": 0}})
    with pytest.raises(ConfigError) as caught:
        config.conversation(Tokenizer(byte_level_json().encode()))
    assert str(caught.value) == "mlc-chat-config.json: conv_config: unknown: separator_style"


def test_a_failed_save_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ChatConfigFile.parse(CURRENT)
    path = config.save(tmp_path)
    before = path.read_bytes()

    def refuse(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        ChatConfigFile.parse(CURRENT | {"temperature": 0.1}).save(tmp_path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
