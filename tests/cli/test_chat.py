import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from relaxlm import ChatModule
from relaxlm.cli import main as program
from relaxlm.cli.conversation import parse_settings
from relaxlm.errors import RequestError
from relaxlm.runtime import generator
from relaxlm.runtime.sampling import Sampled

GREEDY = {"temperature": 0.0, "max_tokens": 8}
GREEDY_OPTIONS = ("--temperature", "0", "--max-tokens", "8")


@pytest.fixture
def chat(tiny):
    """Runs `relaxlm chat` on the tiny model; the result has exit_code, stdout and stderr."""

    def run(*options: str, input: str | bytes = ""):
        command = ["chat", str(tiny.folder), "--model-lib", str(tiny.library), *options]
        return CliRunner().invoke(program.app, command, input=input, prog_name="relaxlm")

    return run


@pytest.fixture(scope="module")
def loaded(tiny) -> ChatModule:
    return ChatModule(tiny.folder, model_lib=tiny.library)


@pytest.fixture
def module(loaded) -> ChatModule:
    """What the program is compared with."""
    loaded.reset_chat()
    return loaded


def on_sample(monkeypatch: pytest.MonkeyPatch, act) -> None:
    """Call `act` with the number of each step of sampling, before it."""
    original, count = generator.sample, 0

    def sample(logits, states, *known):
        nonlocal count
        count += 1
        act(count)
        return original(logits, states, *known)

    monkeypatch.setattr(generator, "sample", sample)


def scripted(monkeypatch: pytest.MonkeyPatch, module: ChatModule, text: str) -> None:
    """Make the model say this, again and again."""
    ids = [*module.tokenizer.encode(text), module.tokenizer.eos_id]
    left: Iterator[int] = iter(())

    def sample(logits, states, *_):
        nonlocal left
        token = next(left, None)
        if token is None:
            left = iter(ids)
            token = next(left)
        return [Sampled(token, None, ())]

    monkeypatch.setattr(generator, "sample", sample)


# One prompt


def test_a_prompt_is_answered_and_only_the_reply_is_on_stdout(chat, module, tiny):
    result = chat("--prompt", "hello", *GREEDY_OPTIONS)
    assert result.exit_code == 0
    assert result.stdout == module.generate("hello", GREEDY) + "\n"
    lines = result.stderr.splitlines()
    assert re.fullmatch(rf"{tiny.folder}: llama, q0f32, cpu; loaded in \d+\.\d s", lines[0])
    assert lines[1] == "memory:"
    assert [line.split()[0] for line in lines[2:]] == ["parameters", "KV", "temporary", "total"]


def test_options_reach_the_sampler(chat, module):
    settings = {
        "temperature": 2.5,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.01,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "max_tokens": 30,
        "seed": 5,
    }
    options = [
        part
        for name, value in settings.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    result = chat("--prompt", "hello", *options)
    assert result.stdout == module.generate("hello", settings) + "\n"
    first = module.replies[0].text[4]
    result = chat("--prompt", "hello", *options, "--stop", "@@@", "--stop", first)
    assert result.stdout == module.replies[0].text.partition(first)[0] + "\n"


def test_a_system_message_comes_first(chat, module):
    result = chat("--prompt", "hello", "--system", "answer", *GREEDY_OPTIONS)
    messages = [{"role": "system", "content": "answer"}, {"role": "user", "content": "hello"}]
    assert result.stdout == module.generate(messages, GREEDY) + "\n"


def test_a_prompt_as_json(chat, module):
    result = chat("--prompt", "größer 🙂", "--jsonl", *GREEDY_OPTIONS)
    answer = json.loads(result.stdout)
    assert 0 < answer.pop("seconds") < 60
    assert answer == {
        "prompt": "größer 🙂",
        "reply": module.generate("größer 🙂", GREEDY),
        "finish_reason": "length",
        "prompt_tokens": module.timings.prompt_tokens,
        "reply_tokens": 8,
    }
    assert "größer 🙂" in result.stdout


def test_bytes_that_are_no_utf8_are_replaced(chat, module):
    result = chat("--prompt", os.fsdecode(b"caf\xe9"), "--jsonl", *GREEDY_OPTIONS)
    assert json.loads(result.stdout)["prompt"] == "caf\ufffd"


def test_a_wrong_request_is_one_line_and_exit_code_1(chat):
    for options, message in (
        (["--prompt", " "], "--prompt is empty, expected a text"),
        (
            ["--prompt", "a", "--temperature", "-1"],
            "temperature = -1.0 is not possible: expected a number, 0 (greedy) or more",
        ),
        (
            ["--prompt", "a", "--overrides", "context=3"],
            "--overrides: 'context=3' is not understood, expected KEY=VALUE separated by ';' with "
            "a key of: context_window_size, prefill_chunk_size, max_batch_size, "
            "sliding_window_size, attention_sink_size, kv_cache_dtype",
        ),
    ):
        result = chat(*options)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.splitlines()[-1] == f"error: {message}"


def test_options_that_exclude_each_other_are_usage_errors(chat):
    result = chat("--prompt", "a", "--prompts", "-")
    assert result.exit_code == 2
    assert "--prompt and --prompts: give one of them" in result.stderr
    result = chat("--jsonl")
    assert result.exit_code == 2
    assert "--jsonl needs --prompt or --prompts" in result.stderr


def test_overrides_make_the_context_smaller(chat):
    result = chat("--prompt", "hello " * 20, "--overrides", "context_window_size=64")
    assert result.exit_code == 1
    assert "float32, 512 bytes per token, 64 tokens of context" in result.stderr
    tokens = re.search(r"error: the prompt has (\d+) tokens, the context window 64", result.stderr)
    assert tokens and int(tokens[1]) >= 64


def test_the_library_is_compiled_when_none_is_named_and_kept(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("RELAXLM_CACHE", str(tmp_path))
    command = ["chat", str(tiny.folder), "--device", "cpu", "--prompt", "hello", *GREEDY_OPTIONS]
    first, second = (CliRunner().invoke(program.app, command) for _ in range(2))
    message = "compiling the library; it is kept for the next time\n"
    assert first.stderr.startswith(message) and message not in second.stderr
    assert first.stdout == second.stdout != ""


# Many prompts


def test_a_file_of_prompts_gives_one_line_each(chat, module, monkeypatch, tmp_path):
    scripted(monkeypatch, module, "a\nb\r\n🙂")
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfhello\r\n\n  \nsecond\xff")
    result = chat("--prompts", str(file))
    assert (result.exit_code, result.stdout) == (0, "a\\nb\\r\\n🙂\n" * 2)
    result = chat("--prompts", str(file), "--jsonl")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["hello", "second\ufffd"]
    assert [answer["reply"] for answer in answers] == ["a\nb\r\n🙂"] * 2
    assert [answer["finish_reason"] for answer in answers] == ["stop"] * 2


def test_prompts_are_answered_independently(chat, module):
    result = chat("--prompts", "-", "--jsonl", *GREEDY_OPTIONS, input="hello\nthe cat\nhello\n")
    replies = [json.loads(line)["reply"] for line in result.stdout.splitlines()]
    expected = [module.generate(p, GREEDY, stateless=True) for p in ("hello", "the cat")]
    assert replies == [*expected, expected[0]]


def test_a_prompt_that_fails_does_not_stop_the_others(chat, module):
    result = chat("--prompts", "-", *GREEDY_OPTIONS, input=f"hello\n{'hello ' * 300}\nhello\n")
    assert result.exit_code == 1
    first, second, third = result.stdout.split("\n")[:-1]
    assert first == third == module.generate("hello", GREEDY).replace("\n", "\\n")
    assert second == ""
    tokens = len(module.prompts.encode([{"role": "user", "content": "hello " * 300}]))
    error = (
        f"the prompt has {tokens} tokens, the context window 256: shorten the prompt, or compile "
        'with a larger --overrides "context_window_size=..." if the model allows it'
    )
    assert result.stderr.splitlines()[-2:] == [
        f"error: prompt 2: {error}",
        "1 of 3 prompts have no reply",
    ]
    result = chat("--prompts", "-", "--jsonl", input=f"{'hello ' * 300}\n")
    assert json.loads(result.stdout) == {"prompt": "hello " * 300, "error": error}


def test_a_file_of_prompts_that_is_not_there(chat, tmp_path):
    result = chat("--prompts", str(tmp_path / "none.txt"))
    assert result.exit_code == 1
    # Noticed before the model is loaded.
    assert result.stderr == (
        f"error: [Errno 2] No such file or directory: '{tmp_path / 'none.txt'}'\n"
    )


# Conversations over a pipe


def test_piped_lines_are_a_conversation(chat, module):
    result = chat(*GREEDY_OPTIONS, input="hello\n\n   \nand?\n")
    expected = [module.generate(prompt, GREEDY) for prompt in ("hello", "and?")]
    assert result.stdout == "".join(f"{reply}\n" for reply in expected)
    assert result.exit_code == 0
    # The same bytes with an end that has no line end.
    assert chat(*GREEDY_OPTIONS, input="hello\nand?").stdout == result.stdout


def test_reset_starts_again_with_the_system_message(chat, module):
    lines = "hello\nand?\n/reset\nhello\n"
    result = chat(*GREEDY_OPTIONS, "--system", "answer", input=lines)
    module.messages = [{"role": "system", "content": "answer"}]
    first, second = (module.generate(prompt, GREEDY) for prompt in ("hello", "and?"))
    assert result.stdout == f"{first}\n{second}\n{first}\n"
    assert "the conversation is forgotten" in result.stderr


def test_exit_leaves_and_other_commands_print_to_stderr(chat):
    result = chat(*GREEDY_OPTIONS, input="/help\n/stats\n/nothing\n  /exit\nhello\n")
    assert (result.exit_code, result.stdout) == (0, "")
    said = result.stderr.partition("total")[2].splitlines()[1:]
    assert said[0] == "/help           this list"
    assert "prefill: -, decode: -" in said
    assert said[-1] == "/nothing is not a command; /help lists them"


def test_a_message_may_begin_with_a_path(chat, module):
    result = chat(*GREEDY_OPTIONS, input="/usr/bin is what?\n")
    assert result.stdout == module.generate("/usr/bin is what?", GREEDY) + "\n"


def test_set_changes_and_shows_settings(chat, module):
    lines = [
        "/set temperature=0; max_gen_len=8",
        "hello",
        "/set temperature=2.5;seed=3",
        "/set",
        "and?",
        "/set temperature=",
        "/set",
    ]
    result = chat("--top-k", "40", input="\n".join(lines))
    first = module.generate("hello", {**GREEDY, "top_k": 40})
    settings = {"temperature": 2.5, "top_k": 40, "max_tokens": 8, "seed": 3}
    assert result.stdout == f"{first}\n{module.generate('and?', settings)}\n"
    said = result.stderr.splitlines()
    assert [line for line in said if line.startswith("temperature")] == [
        "temperature = 2.5",
        "temperature = 1.0",
    ]
    for line in ("top_k = 40", "max_tokens = 8", "seed = 3", "stop = []"):
        assert said.count(line) == 2


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (
            "/set temperature=-1; max_tokens=3",
            "temperature = -1 is not possible: expected a number, 0 (greedy) or more",
        ),
        ("/set top_p=a", "top_p = 'a' is not possible: expected a number from 0 to 1"),
        ("/set tempature=1", "'tempature' is not a generation option: did you mean 'temperature'?"),
        ("/set temperature", "'temperature' is not understood, expected KEY=VALUE"),
        ("/set n=3", "n makes no difference in a conversation; /set lists what does"),
    ],
)
def test_a_wrong_setting_changes_nothing(chat, line, error):
    result = chat("--temperature", "0.5", input=f"{line}\n/set\n")
    assert f"error: {error}\ntemperature = 0.5\n" in result.stderr
    assert "max_tokens = null" in result.stderr


def test_values_of_settings_are_json_or_text():
    assert parse_settings('stop=["a;b", "c"]; ignore_eos=true;seed=3') == {
        "stop": ["a;b", "c"],
        "ignore_eos": True,
        "seed": 3,
    }
    assert parse_settings("stop=User: a=b") == {"stop": "User: a=b"}
    assert parse_settings("stop = ") == {"stop": None}
    with pytest.raises(RequestError):
        parse_settings("7")


def test_an_error_does_not_end_a_conversation(chat, module):
    result = chat(*GREEDY_OPTIONS, input=f"hello\n{'hello ' * 300}\nand?\n")
    expected = [module.generate(prompt, GREEDY) for prompt in ("hello", "and?")]
    assert result.stdout == "".join(f"{reply}\n" for reply in expected)
    assert re.search(r"\nerror: the prompt has \d+ tokens, the context window 256: ", result.stderr)
    assert result.exit_code == 0


def test_a_conversation_says_what_it_left_out(chat):
    options = ("--temperature", "0", "--max-tokens", "40")
    result = chat(*options, input="hello world\n" * 8)
    assert "(the reply ends at its limit of 40 tokens)" in result.stderr
    assert "(the context is full: the 2 oldest messages are forgotten)" in result.stderr


def test_ctrl_c_stops_a_reply_and_the_conversation_goes_on_with_it(chat, module, monkeypatch):
    on_sample(monkeypatch, lambda n: signal.raise_signal(signal.SIGINT) if n == 5 else None)
    handler = signal.getsignal(signal.SIGINT)
    result = chat("--temperature", "0", "--max-tokens", "30", input="hello\nand?\n")
    monkeypatch.undo()
    settings = {"temperature": 0.0, "max_tokens": 5}
    first = module.generate("hello", settings)
    second = module.generate("and?", {**settings, "max_tokens": 30})
    assert result.stdout == f"{first}\n{second}\n"
    assert "(stopped)" in result.stderr
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_twice_takes_the_message_back(chat, module, monkeypatch):
    def interrupt(step: int) -> None:
        if step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    on_sample(monkeypatch, interrupt)
    result = chat("--temperature", "0", "--max-tokens", "30", input="hello\nand?\n")
    monkeypatch.undo()
    settings = {"temperature": 0.0, "max_tokens": 30}
    partial = module.generate("hello", {**settings, "max_tokens": 4}, stateless=True)
    assert result.stdout == f"{partial}\n{module.generate('and?', settings)}\n"
    assert "stopped; the conversation is as it was before this message" in result.stderr


# In a terminal


IN_TERMINAL = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C in this terminal is for this process
from relaxlm.cli.main import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")
def test_in_a_terminal(tiny):
    import pty

    terminal, its_side = pty.openpty()
    options = [str(tiny.folder), "--model-lib", str(tiny.library), *GREEDY_OPTIONS]
    process = subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, "chat", *options],
        stdin=its_side,
        stdout=its_side,
        stderr=its_side,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(its_side)
    shown = b""

    def wait_for(text: str) -> None:
        nonlocal shown
        end = time.monotonic() + 60
        while text.encode() not in shown:
            ready, _, _ = select.select([terminal], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} did not come: {shown!r}"
            shown += os.read(terminal, 4096)
        shown = shown.partition(text.encode())[2]

    def type_in(text: str) -> None:
        wait_for("> ")
        time.sleep(0.2)  # Python misses a signal that comes just before it waits for input
        os.write(terminal, text.encode())

    try:
        wait_for("/help lists the commands")
        type_in("hello\n")
        wait_for("limit of 8 tokens)")
        type_in("/set sed=1\x1b[D\x1b[D\x1b[De\n")  # three to the left, and a letter
        type_in("/set\n")
        wait_for("seed = 1")
        type_in("half a line")
        wait_for("half a line")
        os.write(terminal, b"\x03")
        wait_for("Ctrl-C again, Ctrl-D or /exit to leave")
        type_in("/set\n")  # the half line is gone, and that Ctrl-C forgotten
        wait_for("seed = 1")
        type_in("\x03")
        wait_for("Ctrl-C again")
        type_in("\x03")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
