"""Texts to vectors in the driver, next to Python's on this CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relaxlm import ChatModule
from relaxlm.errors import ConfigError
from relaxlm.web.package import package_web
from tests.tiny_embedder import TinyEmbedder
from tests.web.conftest import RunNode, compile_demo

TEXTS = [f"the {word} sat on a mat" for word in ("cat", "dog", "house")] + ["hello world", "to"]
# Cut off at the longest text, in one step with others or alone.
LONG = "cat dog " * 60

EMBED = """
import { DiskFiles, Embedder, ChatModule } from "./index.js";
const told = (promise) => promise.then(() => "nothing", (e) => `${e.name}: ${e.message}`);
const options = {
  model: new DiskFiles(input.folder),
  library: new Uint8Array(readFileSync(input.library)),
};
const embedder = await Embedder.load(options);
const plain = (vectors) => vectors.map((vector) => Array.from(vector));
output({
  vectors: plain(await embedder.embed(input.texts)),
  queries: plain(await embedder.embed(input.texts, { promptName: "query", dimensions: 7 })),
  cut: plain(await embedder.embed([input.long, ...input.texts], { truncate: true })),
  one: plain(await embedder.embed(input.texts[1])),
  none: await told(embedder.embed([])),
  empty: await told(embedder.embed(["a", ""])),
  long: await told(embedder.embed(input.long)),
  name: await told(embedder.embed("a", { promptName: "question" })),
  dimensions: await told(embedder.embed("a", { dimensions: 65 })),
  chat: await told(ChatModule.load(options)),
});
"""


def compare(
    run: RunNode, encoder: TinyEmbedder, device: str, place: Path, tolerance: float
) -> tuple[dict[str, Any], Path]:
    """Holds vectors against Python's; gives all that the driver said, and the library."""
    library = compile_demo(encoder.folder, device, place / "tiny.wasm")
    data = {"folder": str(encoder.folder), "library": str(library)}
    found = run(EMBED, {**data, "texts": TEXTS, "long": LONG})
    python = ChatModule(encoder.folder, model_lib=encoder.library)
    expected = {
        "vectors": python.embed_text(TEXTS),
        "queries": python.embed_text(TEXTS, prompt_name="query", dimensions=7),
        "cut": python.embed_text([LONG, *TEXTS], truncate=True),
        "one": python.embed_text(TEXTS[1:2]),
    }
    for name, vectors in expected.items():
        np.testing.assert_allclose(
            found[name], vectors, rtol=10 * tolerance, atol=tolerance, err_msg=name
        )
    return found, library


def test_vectors_on_a_gpu_are_those_of_python(
    webgpu_node: RunNode, kept_cache: None, tiny_encoder: TinyEmbedder, tmp_path: Path
) -> None:
    compare(webgpu_node, tiny_encoder, "webgpu", tmp_path, 5e-5)


def test_vectors_are_those_of_python(
    node: RunNode, kept_cache: None, tiny_encoder: TinyEmbedder, tmp_path: Path
) -> None:
    found, library = compare(node, tiny_encoder, "wasm", tmp_path, 1e-5)
    assert found["none"] == "RequestError: no text to embed: expected at least one"
    assert found["empty"] == "RequestError: text 1 has no tokens, expected at least one"
    assert found["long"] == (
        "ContextOverflowError: text 0 has 122 tokens, the context window 40: shorten it, or let "
        "its end be cut off with truncate"
    )
    assert found["name"] == (
        "RequestError: promptName = question: this model's prompts are query, passage"
    )
    assert found["dimensions"] == (
        "RequestError: dimensions = 65: this model's vectors have 64 numbers, expected 1 to 64"
    )
    assert found["chat"] == (
        "LibraryError: the library is for embedding, not for chat: load it with Embedder"
    )
    with pytest.raises(ConfigError, match=r"the page chats, and this model is for embedding; load"):
        package_web(tiny_encoder.folder, [library], tmp_path / "site")
