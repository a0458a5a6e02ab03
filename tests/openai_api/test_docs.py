import re
from pathlib import Path

import pytest

from relaxlm.openai_api.chat_request import ChatCompletionRequest
from relaxlm.openai_api.fields import RequestModel
from relaxlm.openai_api.requests import (
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from relaxlm.openai_api.response_request import ResponseRequest
from relaxlm.openai_api.sampling_fields import OTHER_SERVERS
from tests.tiny_model import TinyModel

DOCUMENT = Path(__file__).parents[2] / "docs" / "openai-api.md"


def section(title: str) -> str:
    text = DOCUMENT.read_text(encoding="utf-8")
    return text.split(f"### {title}\n")[1].split("\n##")[0]


@pytest.mark.parametrize(
    ("title", "model"),
    [
        ("/v1/chat/completions", ChatCompletionRequest),
        ("/v1/completions", CompletionRequest),
        ("/v1/responses", ResponseRequest),
        ("/v1/embeddings", EmbeddingRequest),
        ("/tokenize, /detokenize", TokenizeRequest),
        ("/tokenize, /detokenize", DetokenizeRequest),
    ],
    ids=["chat", "completions", "responses", "embeddings", "tokenize", "detokenize"],
)
def test_every_field_is_in_the_table(title: str, model: type[RequestModel]) -> None:
    named = set(re.findall(r"[`\"{]([a-z_]+)[`\"]", section(title)))
    fields = set(model.model_fields) | (set(model.refused) - set(OTHER_SERVERS))
    if title.startswith("/tokenize"):
        fields.discard("model")
    assert fields <= named
    refused = next(
        (line for line in section(title).splitlines() if line.endswith("| refused |")), ""
    )
    names = set(re.findall("`([a-z_]+)`", refused))
    assert names == set(model.refused) - set(OTHER_SERVERS)


def test_the_example_runs(tiny: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)
    place = f'Engine("{tiny.folder}", model_lib="{tiny.library}")'
    exec(example.replace('Engine("dist/my-model")', place), {})
    assert capsys.readouterr().out
