"""Folders of models with recurrent layers are built and talked to like all others."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from relaxlm import ChatModule, GenerationConfig, models
from relaxlm.cli.build import build
from relaxlm.demo import MODEL_DIR
from tests.compiler.test_rwkv_vocab import vocabulary
from tests.models import stateful
from tests.models.test_gated_delta import VARIANTS as GATED
from tests.models.test_rwkv import VARIANTS as RWKV


def checkpoint(raw: dict, folder: Path) -> Path:
    """A Hugging Face folder with random weights; the tokenizer comes from elsewhere."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    models.load_config(folder)
    save_file(stateful.random_checkpoint(raw), folder / "model.safetensors")
    return folder


def rwkv(folder: Path) -> Path:
    raw = {**RWKV["rwkv6"], "vocab_size": 272, "eos_token_id": 0, "bos_token_id": 0}
    checkpoint(raw, folder)
    (folder / "rwkv_vocab_v1.txt").write_text(vocabulary(), encoding="utf-8")
    return folder


def hybrid(folder: Path) -> Path:
    settings = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    inner = {**GATED["qwen3_5_text"], "vocab_size": settings["vocab_size"]}
    checkpoint({"model_type": "qwen3_5", "text_config": inner}, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder)
    return folder


@pytest.mark.parametrize("make", [rwkv, hybrid])
def test_a_folder_is_built_and_talked_to(make, tmp_path: Path) -> None:
    output = tmp_path / "built"
    build(make(tmp_path / "source"), output, "q4f16_1", "cpu", conv_template="LM", overrides=LIMITS)
    (library,) = output.glob("*.so")
    greedy = GenerationConfig(temperature=0.0, max_tokens=6)
    chat = ChatModule(model=str(output), model_lib_path=str(library))
    first = chat.generate("What is", greedy)
    chat.generate("And then?", greedy)
    chat.reset_chat()
    assert chat.generate("What is", greedy) == first


LIMITS = "context_window_size=256;prefill_chunk_size=64;max_batch_size=4"
