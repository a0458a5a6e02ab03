"""relaxlm compiles open language models into one fast library per device, and runs them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from relaxlm.versions import RELAXLM_VERSION as __version__

if TYPE_CHECKING:
    from relaxlm.engine.config import EngineConfig
    from relaxlm.openai_api.engine import AsyncEngine, Engine
    from relaxlm.runtime.chat_module import ChatConfig, ChatModule
    from relaxlm.runtime.generation import GenerationConfig
    from relaxlm.runtime.streaming import StreamCallback, StreamIterator, StreamToStdout

# Public name -> its module, imported on first use: TVM takes seconds to import.
_PUBLIC = {
    "AsyncEngine": "relaxlm.openai_api.engine",
    "ChatConfig": "relaxlm.runtime.chat_module",
    "ChatModule": "relaxlm.runtime.chat_module",
    "Engine": "relaxlm.openai_api.engine",
    "EngineConfig": "relaxlm.engine.config",
    "GenerationConfig": "relaxlm.runtime.generation",
    "StreamCallback": "relaxlm.runtime.streaming",
    "StreamIterator": "relaxlm.runtime.streaming",
    "StreamToStdout": "relaxlm.runtime.streaming",
}

__all__ = [
    "AsyncEngine",
    "ChatConfig",
    "ChatModule",
    "Engine",
    "EngineConfig",
    "GenerationConfig",
    "StreamCallback",
    "StreamIterator",
    "StreamToStdout",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'relaxlm' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
