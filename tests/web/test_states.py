"""Models with recurrent layers in the driver, next to the same models on this CPU."""

from pathlib import Path

import numpy as np
import pytest

from relaxlm import ChatModule
from relaxlm.compiler.kernels import gpu_attention
from tests.tiny_model import TinyModel
from tests.web.conftest import RunNode, compile_demo
from tests.web.steps import LOAD, RUN_STEPS, on_cpu, talk

# Steps of sequences: how many tokens each gets. Without pages there is room for one.
STEPS = {
    "hybrid": [[[0, 18]], [[0, 1]], [[1, 5], [0, 1]], [[1, 1], [0, 1]], [[0, 3]]],
    "recurrent": [[[0, 18]], [[0, 1]], [[0, 3]]],
}
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.mark.parametrize(("model", "device"), [("recurrent", "wasm"), ("hybrid", "webgpu")])
def test_logits_and_conversations_are_those_of_the_cpu(
    request: pytest.FixtureRequest,
    kept_cache: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: str,
    device: str,
) -> None:
    # On a GPU, even contexts of a few tokens are cut into parts.
    monkeypatch.setattr(gpu_attention, "PART_TOKENS", 16)
    node: RunNode = request.getfixturevalue({"wasm": "node", "webgpu": "webgpu_node"}[device])
    tiny: TinyModel = request.getfixturevalue(f"{model}_tiny")
    library = compile_demo(tiny.folder, device, tmp_path / "tiny.wasm")
    steps, expected = on_cpu(tiny.folder, tiny.library, STEPS[model])
    script = f"{LOAD}const run = {RUN_STEPS};output(await run(await open(), input.steps));"
    data = {"folder": str(tiny.folder), "library": str(library), "steps": steps}
    for ours, theirs in zip(node(script, data), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=5e-3)
    # The next turn repeats the reply; then another answer to the first message is wanted, and then
    # another conversation: as much is computed anew as in Python.
    first = {"role": "user", "content": "the cat sat"}
    turns = [
        ("the cat sat", GREEDY),
        ("and the dog ran", GREEDY),
        ([first], GREEDY),
        ([{"role": "user", "content": "hello"}], GREEDY),
    ]
    talk(node, ChatModule(tiny.folder, model_lib=tiny.library), tiny.folder, library, turns)
