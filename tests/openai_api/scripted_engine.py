"""An engine that plays given updates, for tests of what is made of them."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

from relaxlm.engine.types import (
    ChoiceUpdate,
    FinishReason,
    GenerationRequest,
    PromptReport,
    RequestTimings,
    TokenText,
    Update,
)
from relaxlm.errors import RelaxLMError
from relaxlm.runtime.generation import GenerationConfig
from relaxlm.runtime.sampling import Sampled
from relaxlm.runtime.tokenizer import Tokenizer
from tests import tiny_model

TOOL_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content or '' }}{% for call in m.tool_calls or [] %}<tool_call>"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)


class ScriptedEngine:
    """Stands in for `EngineLoop`. `script` is called with each request on a thread of its own, and
    with a function that delivers updates.

    Attributes:
        submitted: the requests so far. cancelled: ids.
    """

    def __init__(
        self,
        script: Callable[[GenerationRequest, "Player"], None],
        template: str | dict | None = tiny_model.TEMPLATE,
        place: Path | None = None,
    ) -> None:
        self._script = script
        self.model = scripted_model(template, place or Path("model"))
        self.context_window_size = 128
        self.submitted: list[GenerationRequest] = []
        self.cancelled: list[int] = []
        self.refuse_after: tuple[int, RelaxLMError] | None = None
        self.vectors: object = None

    def submit(self, request: GenerationRequest, deliver: Callable[[Update], None]) -> int:
        if self.refuse_after is not None and len(self.submitted) >= self.refuse_after[0]:
            raise self.refuse_after[1]
        self.submitted.append(request)
        player = Player(self, len(self.submitted), request, deliver)
        threading.Thread(target=self._script, args=(request, player), daemon=True).start()
        return player.id

    def cancel(self, request_id: int) -> None:
        self.cancelled.append(request_id)

    def embed(self, prompts: Sequence[Sequence[int]], deliver: Callable) -> None:
        threading.Thread(target=deliver, args=(self.vectors,), daemon=True).start()


class Player:
    """Delivers the updates of one request."""

    def __init__(
        self,
        engine: ScriptedEngine,
        request_id: int,
        request: GenerationRequest,
        deliver: Callable[[Update], None],
    ) -> None:
        self.engine, self.id, self._request, self._deliver = engine, request_id, request, deliver
        self._tokens = 0

    def send(
        self,
        *texts: str,
        index: int = 0,
        finish: FinishReason | None = None,
        stopped_by: int | str | None = None,
        prompt: PromptReport | None = None,
        finished: bool = False,
        ids: Sequence[int] | None = None,
    ) -> None:
        """One update of one choice: a token for each text."""
        asked = self._request.config
        tokens = []
        for i, text in enumerate(texts):
            token = 65 + i if ids is None else ids[i]
            top = tuple((token + j, -0.5 - j) for j in range(asked.top_logprobs))
            sampled = Sampled(token, -0.5, top) if asked.logprobs else Sampled(token, None, ())
            tokens.append(TokenText(sampled, text))
        self._tokens += len(tokens)
        choice = ChoiceUpdate(index, tuple(tokens), "".join(texts), finish, stopped_by)
        timings = RequestTimings(0.5, 0.25, 2.0, self._tokens) if finished else None
        self._deliver(
            Update(self.id, time.perf_counter(), (choice,), prompt, timings, finished=finished)
        )

    def report(self, cached: int = 0) -> PromptReport:
        """Of the prompt, with a log probability of -1 for each token if they are asked for."""
        ids = list(self._request.prompt)
        logprobs = (
            tuple(Sampled(token, -1.0, ((token, -1.0),)) for token in ids[1:])
            if self._request.prompt_logprobs
            else ()
        )
        return PromptReport(len(ids), cached, logprobs)

    def fail(self, error: RelaxLMError) -> None:
        self._deliver(Update(self.id, time.perf_counter(), error=error, finished=True))


def say(*texts: str, stop: bool = True) -> Callable[[GenerationRequest, Player], None]:
    """A script: one update for each text, for every choice alike, and the end."""

    def script(request: GenerationRequest, player: Player) -> None:
        n = request.config.n
        for i, text in enumerate(texts):
            for index in range(n):
                prompt = player.report(cached=2) if i == index == 0 else None
                player.send(text, index=index, prompt=prompt)
        for index in range(n):
            last = index == n - 1
            if stop:
                player.send("", index=index, finish="stop", stopped_by=2, finished=last, ids=[2])
            else:
                player.send(index=index, finish="length", finished=last)

    return script


def scripted_model(template: str | dict | None, folder: Path) -> SimpleNamespace:
    """What services ask of a `ServedModel`: a real tokenizer and template, no weights.

    `template` is Jinja, or a conversation template.
    """
    from relaxlm.runtime.chat_config import ChatConfigFile
    from relaxlm.runtime.prompt import PromptBuilder

    tokenizer = Tokenizer(
        tiny_model.tokenizer_json().encode(), {"eos_token": "<|im_end|>"}, "tokenizer.json"
    )
    config = ChatConfigFile.parse(
        {
            "model_type": "llama",
            "quantization": "q0f32",
            "model_config": {},
            "vocab_size": tiny_model.VOCAB,
            "context_window_size": 128,
            "prefill_chunk_size": 128,
            "active_vocab_size": tiny_model.TOKENS,
            "eos_token_id": 2,
            "relaxlm": {"chat_template": template} if isinstance(template, str) else {},
            "conv_template": template if isinstance(template, dict) else None,
        }
    )
    return SimpleNamespace(
        folder=folder,
        name="scripted",
        config=config,
        tokenizer=tokenizer,
        prompts=PromptBuilder(config, tokenizer),
        library=SimpleNamespace(path=Path(__file__), metadata=SimpleNamespace(hidden_size=4)),
        embedding=config.embedding(is_encoder=False),
        vocab_size=tiny_model.TOKENS,
        continues_text=False,
        embeds_only=False,
        refuse_embedding_model=lambda: None,
        settings=lambda given: given.merged(GenerationConfig(temperature=0.75)),
    )
