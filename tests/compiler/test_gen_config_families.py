"""gen_config on a folder of every architecture, as transformers or the model's authors write it."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from relaxlm.compiler.gen_config import generate_config
from relaxlm.compiler.options import CompileOptions
from relaxlm.models import MODELS, load_config
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.chat_config import ChatConfigFile
from relaxlm.runtime.prompt import PromptBuilder
from relaxlm.runtime.tokenizer import Tokenizer
from tests.models import test_families_1c, test_families_2b, test_rwkv
from tests.models.test_config import OPEN
from tests.models.test_deepseek import VARIANTS as DEEPSEEK
from tests.models.test_encoders import VARIANTS as ENCODERS
from tests.models.test_gemma2 import VARIANTS as GEMMA
from tests.models.test_llama4 import VARIANTS as LLAMA4
from tests.runtime.tokenizer_samples import model_folder

# Architectures without a configuration in transformers.
OWN: dict[str, dict[str, Any]] = {
    **test_families_1c.VARIANTS,
    **test_families_2b.VARIANTS,
    **test_families_2b.OWN_REFERENCE,
    **test_rwkv.VARIANTS,
    "kimi_k2": DEEPSEEK["kimi"],
}
# null in config.json is no field left out, and ids that are part of the computation stay.
TELLING = {
    "queries without a latent": DEEPSEEK["lite"],
    "no caps": GEMMA["uncapped"],
    "no chunks": LLAMA4["maverick"],
    "positions behind the padding": ENCODERS["roberta"],
    "no rotary embeddings": test_families_2b.BAICHUAN_13B,
}
CHAT = [{"role": "user", "content": "2+2?"}]


def written(raw: dict[str, Any], folder: Path) -> tuple[ChatConfigFile, Path, list[str]]:
    """What gen_config makes of a config.json: the file as read again, its folder, the notes."""
    notes: list[str] = []
    source = model_folder(folder / "model", config__json=raw)
    generate_config(source, "q4f16_1", folder / "out", note=notes.append)
    return ChatConfigFile.load(folder / "out"), folder / "out", notes


@pytest.mark.parametrize("model_type", MODELS)
def test_every_architecture(model_type: str, tmp_path: Path) -> None:
    raw = OWN.get(model_type)
    if raw is None:
        assert model_type in CONFIG_MAPPING_NAMES, "a config.json is missing here"
        config = transformers.AutoConfig.for_model(model_type, **OPEN.get(model_type, {}))
        config.save_pretrained(tmp_path / "saved")
        raw = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert raw["model_type"] == model_type
    file, out, notes = written(raw, tmp_path)
    given, read = load_config(raw), load_config(out)
    assert read == given
    assert file.model_type == model_type
    assert (file.vocab_size, file.active_vocab_size) == (
        given.vocab_size,
        min(given.vocab_size, 300),
    )
    assert file.context_window_size == given.longest_text
    assert file.sliding_window_size == (given.sliding_window or -1)
    options = CompileOptions.resolve(read, get_scheme("q4f16_1"))
    assert options.context_window_size == given.longest_text
    tokenizer = Tokenizer.load(out)
    conversation = file.conversation(tokenizer)
    assert conversation is not None
    if given.is_encoder:
        assert (file.model_task, file.chat_templates) == ("embedding", {})
        assert "cls pooling is assumed" in notes[0]
        return
    assert (file.model_task, file.embedding_metadata) == ("chat", None)
    places = (raw, raw.get("text_config") or {}, {"eos_token_id": 2})
    ends = next(end for place in places if (end := place.get("eos_token_id")) is not None)
    ends = ends if isinstance(ends, list) else [ends]
    assert file.eos_token_ids == ends
    assert {2, *ends} <= set(conversation.stop_token_ids)
    prompts = PromptBuilder(file, tokenizer)
    assert prompts.stop_token_ids == {2, *ends}
    assert prompts.text(CHAT) == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert conversation.roles["user"] == "<|im_start|>user"
    assert f"conv_template, for other tools, is {conversation.name}" in notes[-1]


@pytest.mark.parametrize("name", TELLING)
def test_the_result_says_what_the_source_says(name: str, tmp_path: Path) -> None:
    raw = TELLING[name]
    _, out, _ = written(raw, tmp_path)
    assert load_config(out) == load_config(raw)
