"""A model compiled for the CPU of browsers, under Node.js, next to the same model on this CPU."""

from pathlib import Path

import numpy as np
import pytest

from relaxlm import ChatModule
from tests.web.conftest import RunNode
from tests.web.steps import LOAD, RUN_STEPS, on_cpu, talk

# Steps of several sequences: how many tokens each gets.
STEPS = [[[0, 21]], [[0, 1], [1, 17]], [[1, 1], [0, 1]], [[0, 40], [1, 3]], [[0, 1], [1, 1]]]


@pytest.fixture(scope="module")
def chat(demo: Path, demo_cpu: Path) -> ChatModule:
    return ChatModule(demo, model_lib=demo_cpu)


def test_logits_of_mixed_steps_are_those_of_the_cpu(
    node: RunNode, demo: Path, demo_cpu: Path, demo_wasm: Path
) -> None:
    steps, expected = on_cpu(demo, demo_cpu, STEPS)
    script = f"{LOAD}const run = {RUN_STEPS};output(await run(await open(), input.steps));"
    found = node(script, {"folder": str(demo), "library": str(demo_wasm), "steps": steps})
    # The cache is float16: where float32 sums differ in their last bit, a value may round the
    # other way.
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_conversation_is_the_same_as_on_the_cpu(
    node: RunNode, chat: ChatModule, demo: Path, demo_wasm: Path
) -> None:
    greedy = {"temperature": 0}
    turns = [
        ("Who are you?", greedy),
        ("What is 12 + 30?", greedy),
        ("Tell me a story about a fox.", {**greedy, "max_tokens": 40, "stop": ["."]}),
        ([{"role": "user", "content": "Is a fox red?"}], {**greedy, "repetition_penalty": 1.3}),
    ]
    talk(node, chat, demo, demo_wasm, turns)


def test_a_seed_gives_the_reply_of_the_cpu_and_old_turns_are_forgotten(
    node: RunNode, chat: ChatModule, demo: Path, demo_wasm: Path
) -> None:
    # More than the context window holds.
    turns = [
        ("Tell me a story about a hare.", {"seed": seed, "temperature": 1.2, "max_tokens": 60})
        for seed in range(5)
    ]
    talk(node, chat, demo, demo_wasm, turns)
    assert chat.forgotten_messages > 0


def test_a_reply_can_be_ended_early_and_the_conversation_goes_on(
    node: RunNode, demo: Path, demo_wasm: Path
) -> None:
    script = (
        LOAD
        + """
    const chat = await open();
    const controller = new AbortController();
    let pieces = 0;
    const story = "Tell me a story about a fox.";
    for await (const _ of chat.chat(story, { temperature: 0 }, { signal: controller.signal })) {
      if (++pieces === 3) controller.abort();
    }
    const aborted = { ...chat.last, messages: chat.messages };
    for await (const _ of chat.chat("Go on.", { temperature: 0, max_tokens: 30 })) break;
    const left = { ...chat.last, messages: chat.messages };
    const after = await chat.generate("What is 2 + 3?", { temperature: 0 });
    const busy = chat.chat("One");
    await busy.next();
    const refused = await chat.generate("Two").catch((error) => error.message);
    await busy.return();
    output({ aborted, left, after, refused, messages: chat.messages.length });
    """
    )
    found = node(script, {"folder": str(demo), "library": str(demo_wasm)})
    for part, messages in (("aborted", 2), ("left", 4)):
        assert found[part]["finishReason"] == "cancelled"
        assert found[part]["messages"][-1] == {"role": "assistant", "content": found[part]["text"]}
        assert len(found[part]["messages"]) == messages
        assert found[part]["text"]
    assert found["after"]
    assert found["refused"].startswith("a reply is being made")
    assert found["messages"] == 8


def test_what_does_not_fit_is_refused(node: RunNode, demo: Path, demo_wasm: Path) -> None:
    script = (
        LOAD
        + """
    const told = (promise) => promise.then(() => "nothing", (e) => `${e.name}: ${e.message}`);
    const index = await new DiskFiles(input.folder).json("tensor-cache.json");
    const changed = structuredClone(index);
    changed.records[0].records[0].name = "another.weight";
    const with_ = (name, content) => {
      const files = new DiskFiles(input.folder);
      const json = files.json.bind(files);
      files.json = async (asked) => (asked === name ? content : json(asked));
      return open({ model: files });
    };
    const config = await new DiskFiles(input.folder).json("mlc-chat-config.json");
    const chat = await open();
    output({
      context: await told(open({ contextWindowSize: 1000 })),
      module: await told(open({ library: new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0]) })),
      weights: await told(with_("tensor-cache.json", changed)),
      preset: await told(with_("mlc-chat-config.json", { ...config, quantization: "q0f32" })),
      none: await told(with_("mlc-chat-config.json", undefined)),
      long: await told(chat.generate("word ".repeat(300))),
      option: await told(chat.generate("Hi", { temprature: 1 })),
      role: await told(chat.generate([{ role: "robot", content: "Hi" }])),
      messages: chat.messages,
    });
    """
    )
    found = node(script, {"folder": str(demo), "library": str(demo_wasm)})
    assert found["context"].startswith("ConfigError: contextWindowSize = 1000, but the library was")
    assert found["module"].startswith("LibraryError: this is no")
    assert found["weights"].startswith(
        "WeightsError: the weights do not fit the model: 1 missing (model.embed_tokens.q_weight), "
        "1 unused (another.weight)"
    )
    assert found["preset"] == (
        "ConfigError: the library was compiled for quantization = q4f16_1, but the model's folder "
        "has q0f32"
    )
    assert found["none"].startswith("ConfigError: no mlc-chat-config.json")
    assert found["long"].startswith("ContextOverflowError: the prompt has ")
    assert found["option"].startswith("RequestError: 'temprature' is not a generation option")
    assert found["role"].startswith("TemplateError: the chat template refuses this conversation")
    assert found["messages"] == []
