"""A model compiled for the GPU of browsers, in Node.js by Dawn, the WebGPU of Chromium."""

from typing import Any

import numpy as np
import pytest

from relaxlm import ChatModule
from tests.web.conftest import RunNode
from tests.web.steps import LOAD, RUN_STEPS, on_cpu

# Steps of several sequences: how many tokens each gets.
STEPS = [[[0, 18]], [[0, 1]], [[1, 5], [0, 1]], [[1, 1], [0, 1]]]
PROMPTS = ["Who are you?", "What is 12 + 30?", "Is a fox red?"]
RUN = (
    LOAD
    + """
import { Sampler } from "./sampling.js";
"""
    + f"const run = {RUN_STEPS};"
    + """
const chat = await open();
const logits = await run(chat, input.steps);
chat.dispose();
const other = await open();
const replies = [];
// The demo's few logits would be read whole.
Sampler.prototype.blocksRead = () => ({ largest: 2, named: [3] });
const { executor } = other;
const few = executor.few;
let enough = 0;
executor.few = async (...given) => {
  const found = await few.apply(executor, given);
  enough += found.haveLargest(found.values, 1);
  return found;
};
for (const prompt of input.prompts) {
  other.reset();
  await other.generate(prompt, { temperature: 0, max_tokens: 24 });
  replies.push(other.last.tokens);
}
output({ logits, replies, enough });
"""
)


# What rounding may make of logits up to 12. In float32, WGSL lets sine and cosine, and with them
# the rotary embedding, be off by 2 ** -11; in float16, every activation is rounded.
MOST = {"float16": 0.03, "float32": 5e-3}


def test_logits_and_greedy_tokens_are_those_of_the_cpu(
    webgpu_node: RunNode, software_gpu: tuple[str, str], request: pytest.FixtureRequest
) -> None:
    _, dtype = software_gpu
    name = {"float16": "demo", "float32": "demo32"}[dtype]
    folder, cpu, library = (
        request.getfixturevalue(f"{name}{what}") for what in ("", "_cpu", "_webgpu")
    )
    steps, expected = on_cpu(folder, cpu, STEPS)
    data: dict[str, Any] = {"folder": str(folder), "steps": steps, "prompts": PROMPTS}
    found = webgpu_node(RUN, {**data, "library": str(library)})
    for ours, theirs in zip(found["logits"], expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=MOST[dtype])
    chat = ChatModule(folder, model_lib=cpu)
    for prompt, tokens in zip(PROMPTS, found["replies"], strict=True):
        chat.reset_chat()
        chat.generate(prompt, {"temperature": 0, "max_tokens": 24})
        assert tokens == chat.replies[0].tokens, prompt
    assert found["enough"] > 0.9 * sum(map(len, found["replies"]))
