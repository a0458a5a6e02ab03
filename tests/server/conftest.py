"""A server with the tiny model, for all tests here that need a real engine."""

import json
import shutil
from collections.abc import Iterator

import pytest

from relaxlm.engine.config import EngineConfig
from relaxlm.engine.loop import EngineLoop
from relaxlm.server.app import ApiServer
from relaxlm.server.settings import ServerSettings
from tests.server.serving import Running, running
from tests.tiny_model import TinyModel

# As Qwen's, without the schemas: they would fill the tiny model's context. Two messages crash it.
TOOL_TEMPLATE = (
    "{% if tools %}<tool_call>{% for t in tools %}{{ t.function.name }}: "
    "{{ t.function.description }} {% endfor %}</tool_call>{% endif %}"
    "{% for m in messages %}"
    "{% if m.content == 'refuse' %}{{ raise_exception('not this one') }}{% endif %}"
    "{% if m.content == 'crash' %}{{ 1 // 0 }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="package")
def engine(tiny: TinyModel) -> Iterator[EngineLoop]:
    config = EngineConfig(mode="server", max_batch_size=4, max_waiting=8)
    with EngineLoop.load(tiny.folder, tiny.library, config=config, threads=1) as started:
        yield started


@pytest.fixture(scope="package")
def tiny_server(engine: EngineLoop) -> Iterator[Running]:
    with running(ApiServer(engine, ServerSettings())) as started:
        yield started


@pytest.fixture(scope="package")
def tool_server(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The tiny model with a chat template that shows tools."""
    folder = tmp_path_factory.mktemp("tools") / "tiny-tools"
    shutil.copytree(tiny.folder, folder)
    file = folder / "mlc-chat-config.json"
    config = json.loads(file.read_text())
    config["relaxlm"]["chat_template"] = TOOL_TEMPLATE
    file.write_text(json.dumps(config))
    with EngineLoop.load(folder, tiny.library, threads=1) as started:
        with running(ApiServer(started, ServerSettings())) as server:
            yield server
