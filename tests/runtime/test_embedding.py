"""Vectors of texts are those that transformers and a pooling make, however texts share steps."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from relaxlm import ChatModule
from relaxlm.errors import ContextOverflowError, LibraryError, RequestError
from relaxlm.runtime.chat_config import EmbeddingMetadata, EmbeddingSection
from relaxlm.runtime.embedding import Embedder, TextReader
from relaxlm.runtime.tokenizer import Tokenizer
from tests.tiny_embedder import LONGEST, TinyEmbedder, unit

# From one token to the longest, and enough for several steps of the smaller chunk below.
TEXTS = [
    "the cat",
    "hello world : the dog ran to the house",
    "x",
    "The CAT sat on the mat and the dog ran to the house " * 2,
    "qwertyuiop asdfghjkl",
    "the cat sat on the mat",
] * 3


@pytest.fixture(scope="module")
def encoder(tiny_encoder: TinyEmbedder) -> ChatModule:
    return ChatModule(tiny_encoder.folder, model_lib=tiny_encoder.library)


@pytest.fixture(scope="module")
def decoder(tiny_embedder: TinyEmbedder) -> ChatModule:
    return ChatModule(tiny_embedder.folder, model_lib=tiny_embedder.library)


def test_an_encoder_gives_the_mean_of_its_states(encoder, tiny_encoder) -> None:
    expected = tiny_encoder.vectors(TEXTS)
    np.testing.assert_allclose(encoder.embed_text(TEXTS), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(encoder.embed_text("x"), expected[2:3], rtol=1e-4, atol=1e-5)


def test_a_decoder_gives_the_state_at_the_token_behind_the_text(decoder, tiny_embedder) -> None:
    expected = unit(tiny_embedder.vectors(TEXTS))
    np.testing.assert_allclose(decoder.embed_text(TEXTS), expected, rtol=1e-4, atol=1e-5)
    # Matryoshka: the first numbers, and length 1 again.
    part = decoder.embed_text(TEXTS, dimensions=24)
    np.testing.assert_allclose(part, unit(expected[:, :24]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last", "max"])
@pytest.mark.parametrize("chunk", [7, 96])
def test_every_pooling_in_whole_texts_and_in_chunks(
    decoder, tiny_embedder, pooling: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = decoder.executor
    limits = executor.limits.model_copy(update={"prefill_chunk_size": chunk})
    monkeypatch.setattr(executor, "limits", limits)
    metadata = EmbeddingMetadata(model_type="decoder", pooling_strategy=pooling, normalize=False)
    embedder = Embedder(executor, decoder.sequences, metadata)
    texts = [tiny_embedder.token_ids(text) for text in TEXTS[:6]]
    found: list[np.ndarray] = []
    together = []
    while len(found) < len(texts):
        together.append(embedder.together(texts[len(found) :]))
        found += embedder.run(texts[len(found) :][: together[-1]])
    # 3, 10, 2, 25, 20 and 7 tokens: as many as fit into a step, or one that does not.
    assert together == ([1, 1, 1, 1, 1, 1] if chunk == 7 else [6]), together
    expected = tiny_embedder.vectors(TEXTS[:6], pooling)
    np.testing.assert_allclose(np.stack(found), expected, rtol=1e-4, atol=1e-5)
    assert len(decoder.sequences) == 0


def test_prompts_stand_in_front_of_texts(encoder, tiny_encoder) -> None:
    expected = tiny_encoder.vectors(["query: the cat"])
    for given in ({"prompt_name": "query"}, {"prompt": "query: "}):
        np.testing.assert_allclose(
            encoder.embed_text(" the cat ", **given), expected, rtol=1e-4, atol=1e-5
        )
    with pytest.raises(RequestError) as raised:
        encoder.embed_text("the cat", prompt_name="question")
    assert (
        str(raised.value) == "prompt_name = 'question': this model's prompts are 'query', 'passage'"
    )
    with pytest.raises(RequestError, match="prompt and prompt_name are both given"):
        encoder.embed_text("the cat", prompt_name="query", prompt="query: ")


def test_a_text_that_is_too_long_is_refused_or_cut(encoder, tiny_encoder) -> None:
    long = "the cat sat on the mat " * 10
    with pytest.raises(ContextOverflowError) as raised:
        encoder.embed_text(["x", long])
    assert str(raised.value) == (
        f"text 1 has 62 tokens, the context window {LONGEST}: shorten it, or let its end be cut "
        "off with truncate"
    )
    # The tokens around it stay.
    words = long.split()[: LONGEST - 2]
    expected = tiny_encoder.vectors([" ".join(words)])
    found = encoder.embed_text(long, truncate=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RequestError, match="text 0 has no tokens"):
        encoder.embed_text([""])


def test_an_embedding_model_does_not_chat(encoder, decoder) -> None:
    for module in (encoder, decoder):
        for ask in (module.generate, lambda text, m=module: m.benchmark_generate(text, 4)):
            with pytest.raises(RequestError) as raised:
                ask("hello")
            assert str(raised.value) == (
                f"{module.folder.name} is an embedding model: it makes vectors of texts and writes "
                "no replies. Use `relaxlm embed`, ChatModule.embed_text or /v1/embeddings"
            )
    memory = encoder.stats(verbose=True).splitlines()[2]
    assert re.fullmatch(r"memory: \S+ kB parameters, up to \S+ MB temporary", memory)


def test_a_library_of_another_task_is_refused(decoder, tiny_embedder, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    shutil.copytree(tiny_embedder.folder, folder)
    file = folder / "mlc-chat-config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"model_task": "chat"}))
    with pytest.raises(LibraryError, match="compiled for model_task = 'embedding', but"):
        ChatModule(folder, model_lib=tiny_embedder.library)


def test_texts_are_read_as_the_model_expects(tiny_encoder) -> None:
    tokenizer = Tokenizer.load(tiny_encoder.folder)
    cat = tokenizer.encode("cat")
    assert TextReader(tokenizer, EmbeddingSection(), 9).ids("cat") == cat
    strict = EmbeddingSection(default_prompt_name="q", prompts={"q": "Query: "}, lowercase=True)
    reader = TextReader(tokenizer, strict, 9)
    assert reader.prompt() == "Query: " and reader.prompt("q") == "Query: "
    assert reader.ids("CAT", reader.prompt()) == tokenizer.encode("query: cat")
