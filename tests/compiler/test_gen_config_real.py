"""gen_config on the shared files of real models."""

from pathlib import Path
from typing import Any

import pytest

from relaxlm.compiler.gen_config import generate_config
from relaxlm.models import load_config
from relaxlm.runtime.chat_config import ChatConfigFile
from relaxlm.runtime.prompt import PromptBuilder
from relaxlm.runtime.tokenizer import Tokenizer
from tests.runtime.tokenizer_samples import shared_file
from tests.shared_data import SHARED, needs_shared_data

CHAT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3?"},
]

# Shared folders put together: config, tokenizer files -> what the file must say.
FOLDERS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "qwen2.5": (
        "Qwen2.5-0.5B-Instruct.json",
        {
            "tokenizer.json": "qwen2/tokenizer.json.xz",
            "tokenizer_config.json": "qwen2/tokenizer_config.qwen2.5.json",
        },
        {
            "template": "qwen2",
            "alike": 3,
            "active": 151665,
            "eos": [151645],
            "stop": {151643, 151645},
        },
    ),
    "qwen3 from vocab.json": (
        "Qwen3-0.6B.json",
        {
            "vocab.json": "qwen2/vocab.json",
            "merges.txt": "qwen2/merges.txt",
            "tokenizer_config.json": "qwen2/tokenizer_config.qwen3.json",
        },
        {
            "template": "qwen3",
            "alike": 1,
            "active": 151669,
            "eos": [151645],
            "stop": {151643, 151645},
        },
    ),
    "llama 3 from tiktoken": (
        "Llama-3.2-1B-Instruct.json",
        {
            "tokenizer.model": "llama-3/tokenizer.model",
            "tokenizer_config.json": "llama-3/tokenizer_config.json",
        },
        {
            "template": "llama-3",
            "alike": 1,
            "active": 128256,
            "eos": [128001, 128008, 128009],
            "stop": {128001, 128008, 128009},
        },
    ),
    "mistral from sentencepiece": (
        "Mistral-7B-Instruct-v0.3.json",
        {
            "tokenizer.model": "mistral/tokenizer.model.v3",
            "chat_template.jinja": "mistral/chat_template.v3.jinja",
        },
        {"template": "mistral_default", "alike": 0, "active": 32768, "eos": [2], "stop": {2}},
    ),
    "tinyllama": (
        "TinyLlama-1.1B-Chat-v1.0.json",
        {
            "tokenizer.json": "llama-2/tokenizer.json",
            "tokenizer_config.json": "llama-2/tokenizer_config.json",
        },
        {"template": "LM", "alike": None, "active": 32000, "eos": [2], "stop": {2}},
    ),
}


@needs_shared_data
@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_real_models(name: str, tmp_path: Path) -> None:
    config_name, files, expected = FOLDERS[name]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((SHARED / "configs" / config_name).read_bytes())
    for target, source in files.items():
        (folder / target).write_bytes(shared_file(source))
    notes: list[str] = []
    generate_config(folder, "q4f16_1", tmp_path / "out", note=notes.append)
    config = ChatConfigFile.load(tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    template = config.conversation(tokenizer)
    assert template is not None
    assert template.name == expected["template"]
    assert set(template.stop_token_ids) == expected["stop"]
    assert (config.active_vocab_size, config.eos_token_ids) == (expected["active"], expected["eos"])
    if expected["alike"] is not None:
        assert f"writes {expected['alike']} of 3 test conversations alike" in notes[-1]
    assert load_config(tmp_path / "out") == load_config(folder)
    builder = PromptBuilder(config, tokenizer)
    ids = builder.encode(CHAT)
    assert tokenizer.decode(ids, skip_special_tokens=False).count("2+2?") == 1
    assert ids.count(tokenizer.bos_id or -1) <= 1
    assert set(config.tokenizer_files) <= {path.name for path in (tmp_path / "out").iterdir()}


@needs_shared_data
def test_the_stories_model(tmp_path: Path) -> None:
    source = SHARED / "stories260k-llama"
    generate_config(source, "q0f32", tmp_path)
    config, tokenizer = ChatConfigFile.load(tmp_path), Tokenizer.load(tmp_path)
    assert (config.temperature, config.eos_token_ids, config.active_vocab_size) == (
        0.0,
        [1, 2],
        512,
    )
    prompt = PromptBuilder(config, tokenizer).encode_text("Once upon a time")
    assert prompt == [1, 403, 407, 261, 378]
