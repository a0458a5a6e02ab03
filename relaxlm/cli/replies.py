"""Replies to single prompts, as text or as JSON lines: `relaxlm chat --prompt` and `--prompts`."""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from relaxlm.errors import RelaxLMError, RequestError
from relaxlm.runtime.chat_module import ChatModule
from relaxlm.runtime.generation import GenerationConfig
from relaxlm.runtime.prompt import Message
from relaxlm.runtime.streaming import StreamToStdout


def use_utf8() -> None:
    """Let no character or byte stop a chat: pipes and files are UTF-8, what is not is replaced."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # A terminal knows its own encoding.
        encoding = None if stream.isatty() else "utf-8"
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding=encoding, errors="replace")


def cleaned(text: str) -> str:
    """A text from the command line or a terminal; bytes that were no UTF-8 become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def read_prompts(path: Path) -> Iterator[str]:
    """The lines of a file that are not empty; for "-" of standard input, as they come.

    Raises:
        OSError: the file cannot be read; at once, not when the first line is asked for.
    """
    if str(path) == "-":
        return _prompts(sys.stdin)
    return _prompts(path.read_text(encoding="utf-8", errors="replace").split("\n"))


def _prompts(lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        if number == 0:
            line = line.removeprefix("\ufeff")  # which some editors put at the start of a file
        if line.strip():
            yield line.rstrip("\r\n")


def answer_one(
    module: ChatModule, prompt: str, settings: GenerationConfig, system: str | None, jsonl: bool
) -> None:
    """Answer a prompt: streamed as text, or as one JSON object.

    Raises:
        RequestError: an empty prompt.
    """
    if not prompt.strip():
        raise RequestError("--prompt is empty, expected a text")
    if jsonl:
        _print_json(_answer(module, prompt, settings, system))
    else:
        stream = StreamToStdout(callback_interval=1)
        module.generate(_messages(prompt, system), settings, stream, stateless=True)


def answer_each(
    module: ChatModule,
    prompts: Iterable[str],
    settings: GenerationConfig,
    system: str | None,
    jsonl: bool,
) -> int:
    """Answer prompts independently, one line each; a prompt that fails does not stop the others.

    Returns:
        How many failed. Their lines are empty, or objects with "error".
    """
    count = failed = 0
    for count, prompt in enumerate(prompts, 1):
        try:
            answer = _answer(module, prompt, settings, system)
        except RelaxLMError as error:
            failed += 1
            answer = {"prompt": prompt, "error": str(error)}
            print(f"error: prompt {count}: {error}", file=sys.stderr)
        if jsonl:
            _print_json(answer)
        else:
            print(_one_line(answer.get("reply", "")), flush=True)
    if failed:
        print(f"{failed} of {count} prompts have no reply", file=sys.stderr)
    return failed


def _answer(
    module: ChatModule, prompt: str, settings: GenerationConfig, system: str | None
) -> dict[str, Any]:
    started = time.perf_counter()
    module.generate(_messages(prompt, system), settings, stateless=True)
    reply = module.replies[0]
    return {
        "prompt": prompt,
        "reply": reply.text,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": module.timings.prompt_tokens,
        "reply_tokens": len(reply.tokens),
        "seconds": round(time.perf_counter() - started, 4),
    }


def _messages(prompt: str, system: str | None) -> list[Message]:
    messages: list[Message] = [{"role": "user", "content": prompt}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _one_line(text: str) -> str:
    return text.replace("\r", "\\r").replace("\n", "\\n")


def _print_json(answer: dict[str, Any]) -> None:
    print(json.dumps(answer, ensure_ascii=False), flush=True)
