"""Steps and conversations in a driver, and what the same give on this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relaxlm import ChatModule
from relaxlm.runtime.cache_size import CacheSize
from relaxlm.runtime.executor import Executor
from relaxlm.runtime.library import Library
from relaxlm.runtime.params import WeightFolder

PAGES = 16
# In Node.js; `input` has folder and library.
LOAD = """
import { ChatModule, DiskFiles } from "./index.js";
const open = (more) => ChatModule.load({
  model: new DiskFiles(input.folder),
  library: new Uint8Array(readFileSync(input.library)),
  ...more,
});
"""
# A function of a ChatModule and of steps as `on_cpu` gives them: the logits of each step.
RUN_STEPS = """
async ({ executor, sequences }, steps) => {
  sequences.add();
  sequences.add();
  const found = [];
  for (const { counts, ids } of steps) {
    const tables = sequences.batch(counts);
    const last = tables.rowOffsets.slice(1).map((end) => end - 1);
    found.push(Array.from(await executor.forward(tables, ids, last)));
  }
  return found;
}
"""


def on_cpu(
    folder: Path, library: Path, counts: Sequence[Sequence[Sequence[int]]]
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Steps of random tokens, and the logits of each sequence's last one.

    Args:
        counts: per step (sequence 0 or 1, new tokens) of each that takes part.
    """
    rng = np.random.default_rng(0)
    loaded = Library.load(library)
    size = CacheSize.of(loaded.metadata, PAGES, 2)
    sequences = size.sequences(loaded.metadata)
    executor = Executor(loaded, WeightFolder(folder), size.pages, size.state_slots)
    assert [sequences.add(), sequences.add()] == [0, 1]
    steps, expected = [], []
    for step in counts:
        tables = sequences.batch([(seq, count) for seq, count in step])
        ids = rng.integers(0, loaded.metadata.vocab_size, int(tables.row_offsets[-1]), np.int32)
        expected.append(executor.forward(tables, ids, tables.row_offsets[1:] - 1).ravel())
        steps.append({"counts": step, "ids": ids.tolist()})
    return steps, expected


TALK = (
    LOAD
    + """
const chat = await open();
const replies = [];
for (const { prompt, settings } of input.turns) {
  const pieces = [];
  for await (const piece of chat.chat(prompt, settings)) pieces.push(piece);
  const { tokens, text, finishReason, promptTokens, reusedTokens } = chat.last;
  replies.push({ tokens, text, finishReason, promptTokens, reusedTokens, pieces });
}
output({ replies, messages: chat.messages });
"""
)


def talk(
    node: Callable[..., Any], chat: ChatModule, folder: Path, library: Path, turns: list[Any]
) -> None:
    """The same conversation here and there."""
    turns = [{"prompt": prompt, "settings": settings} for prompt, settings in turns]
    data = {"folder": str(folder), "library": str(library), "turns": turns}
    found = node(TALK, data)
    chat.reset_chat()
    for turn, reply in zip(turns, found["replies"], strict=True):
        text = chat.generate(turn["prompt"], turn["settings"])
        assert reply["text"] == text, turn
        assert reply["tokens"] == chat.replies[0].tokens, turn
        assert reply["finishReason"] == chat.replies[0].finish_reason
        assert reply["promptTokens"] == chat.timings.prompt_tokens
        assert reply["reusedTokens"] == chat.timings.reused_tokens
        assert "".join(reply["pieces"]) == text
    assert found["messages"] == chat.messages
