"""A conversation in a terminal or over a pipe: `relaxlm chat` without --prompt."""

import json
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from relaxlm.cli.replies import cleaned
from relaxlm.errors import RelaxLMError, RequestError
from relaxlm.runtime.chat_module import ChatModule
from relaxlm.runtime.generation import GenerationConfig
from relaxlm.runtime.streaming import StreamCallback, StreamToStdout

HELP = """\
/help           this list
/set            show the generation settings
/set KEY=VALUE  change one, such as temperature=0.7 or stop=["###"]; KEY= goes back to the default
/stats          speed, memory and counts of the last reply
/reset          forget the conversation
/exit           leave; so does Ctrl-D
Ctrl-C stops a reply; the conversation goes on with what it has so far."""

# A message that begins with a path is not meant for us.
_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)

# GenerationConfig fields that make no difference to what a conversation shows.
_NOT_SHOWN = ("n", "logprobs", "top_logprobs")


class Conversation:
    """Reads messages from standard input and prints replies; the rest goes to standard error."""

    def __init__(self, module: ChatModule, settings: GenerationConfig, system: str | None) -> None:
        """
        Args:
            settings: fields that are not set come from the model's folder.
            system: a system message, here and after /reset.
        """
        self.module = module
        self.given = settings.model_dump(exclude_unset=True)
        self.system = system
        self.typing = sys.stdin.isatty()
        self._start()

    def run(self) -> None:
        """Until the end of the input, /exit, or a second Ctrl-C in a row at the prompt."""
        if self.typing:
            with_editing()
            say("/help lists the commands")
        interrupts = 0
        while True:
            try:
                line = self._read()
            except EOFError:
                break
            except KeyboardInterrupt:
                if not self.typing:
                    raise
                interrupts += 1
                if interrupts == 2:
                    break
                say("\nCtrl-C again, Ctrl-D or /exit to leave")
                continue
            interrupts = 0
            if not self.take(line):
                return
        if self.typing:
            say()

    def take(self, line: str) -> bool:
        """Answer a message or do a command; False to leave. Empty lines are nothing."""
        text = cleaned(line).strip()
        command = _COMMAND.fullmatch(text)
        if command is None:
            if text:
                self._answer(text)
            return True
        name, argument = command[1], (command[2] or "").strip()
        if name == "exit":
            return False
        if name == "help":
            say(HELP)
        elif name == "stats":
            say(self.module.stats(verbose=True))
        elif name == "reset":
            self._start()
            say("the conversation is forgotten")
        elif name == "set":
            self._set(argument)
        else:
            say(f"/{name} is not a command; /help lists them")
        return True

    def _start(self) -> None:
        self.module.reset_chat()
        if self.system:
            self.module.messages = [{"role": "system", "content": self.system}]

    def _read(self) -> str:
        """The next line.

        Raises:
            EOFError: there is none.
        """
        if not self.typing:
            if line := sys.stdin.readline():
                return line
            raise EOFError
        if sys.stdout.isatty():
            return input("> ")
        print("> ", end="", file=sys.stderr, flush=True)  # replies alone go to a file
        return input()

    def _answer(self, text: str) -> None:
        stream = StreamToStdout(callback_interval=1)
        try:
            with first_ctrl_c_cancels(stream):
                self.module.generate(text, GenerationConfig(**self.given), stream)
        except KeyboardInterrupt:
            say("stopped; the conversation is as it was before this message")
        except RelaxLMError as error:
            say(f"error: {error}")
        else:
            self._comment()

    def _comment(self) -> None:
        """What is not to be seen from a reply."""
        reply = self.module.replies[0]
        if reply.finish_reason == "cancelled":
            say("(stopped)")
        if reply.finish_reason == "length":
            say(f"(the reply ends at its limit of {len(reply.tokens)} tokens)")
        if count := self.module.forgotten_messages:
            say(f"(the context is full: the {count} oldest messages are forgotten)")

    def _set(self, assignments: str) -> None:
        """Change settings, all of them or none; without any, show all."""
        if not assignments:
            say(settings_text(self.module.settings(self.given)))
            return
        try:
            changed = {**self.given, **parse_settings(assignments)}
            changed = {name: value for name, value in changed.items() if value is not None}
            self.module.settings(changed)
        except RelaxLMError as error:
            say(f"error: {error}")
        else:
            self.given = changed


def parse_settings(text: str) -> dict[str, Any]:
    """'temperature=0.7; stop=["a"]' as a dictionary; None for a value that is left out.

    A value is JSON, or else a string as it is.

    Raises:
        RequestError: a part without "=", or a key that a conversation has no use for.
    """
    result: dict[str, Any] = {}
    for part in re.split(r";\s*(?=\w+\s*=)", text):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise RequestError(f"{part!r} is not understood, expected KEY=VALUE")
        if name in _NOT_SHOWN:
            raise RequestError(
                f"{name} makes no difference in a conversation; /set lists what does"
            )
        try:
            parsed = json.loads(value) if value else None
        except ValueError:
            parsed = value
        result["max_tokens" if name == "max_gen_len" else name] = parsed
    return result


def settings_text(settings: GenerationConfig) -> str:
    """Every setting on a line, JSON values."""
    values = settings.model_dump(mode="json", exclude=set(_NOT_SHOWN))
    return "\n".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()
    )


@contextmanager
def first_ctrl_c_cancels(stream: StreamCallback) -> Iterator[None]:
    """Within, Ctrl-C cancels a generation; again before it has ended, it is KeyboardInterrupt."""

    def interrupted(*_: object) -> None:
        if stream.cancelled:
            raise KeyboardInterrupt
        stream.cancel()

    previous = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def with_editing() -> None:
    """Arrow keys and history in `input`, where Python has them."""
    try:
        import readline  # noqa: F401
    except ImportError:  # Windows, whose console has its own
        pass


def say(text: str = "") -> None:
    print(text, file=sys.stderr, flush=True)
