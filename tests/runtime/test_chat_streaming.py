"""ChatModule on a tiny random model: streamed text, where replies end, threads, cancelling."""

import shutil
import threading

import pytest

from relaxlm import ChatModule, StreamIterator
from relaxlm.errors import ContextOverflowError, RequestError
from tests.runtime.chatting import GREEDY, Recorder, free_pages, say, scripted

# Text


@pytest.mark.parametrize("seed", range(8))
def test_streamed_text_is_the_returned_text_in_whole_characters(chat, seed):
    recorder = Recorder()
    settings = {"seed": seed, "temperature": 3.0, "max_tokens": 80, "ignore_eos": True}
    text = chat.generate("hello", settings, recorder)
    assert "".join(recorder.pieces) == text
    assert recorder.ends == [None]
    assert text == chat.tokenizer.decode(chat.replies[0].tokens)[: len(text)]
    for piece in recorder.pieces:
        piece.encode()  # no surrogates


def test_stop_strings_end_a_reply_and_are_never_streamed(chat, monkeypatch):
    ids = chat.tokenizer.encode("größer 🙂 ST and STOP. More")
    scripted(monkeypatch, ids)
    recorder = Recorder()
    text = chat.generate("hello", {"stop": ["STOP.", "never"]}, recorder)
    assert text == "größer 🙂 ST and "
    assert "".join(recorder.pieces) == text
    assert chat.replies[0].finish_reason == "stop"
    assert chat.messages[-1]["content"] == text


def test_the_end_token_ends_a_reply_unless_ignored(chat, monkeypatch):
    ids = [*chat.tokenizer.encode("one"), chat.tokenizer.eos_id, *chat.tokenizer.encode("two")]
    scripted(monkeypatch, ids)
    assert chat.generate("hello", stateless=True) == "one"
    assert chat.replies[0].finish_reason == "stop"
    scripted(monkeypatch, ids)
    settings = {"ignore_eos": True, "max_tokens": len(ids)}
    assert chat.generate("hello", settings, stateless=True) == "onetwo"
    assert chat.replies[0].finish_reason == "length"


@pytest.mark.parametrize("name", ["max_tokens", "max_gen_len"])
def test_max_tokens(chat, name):
    chat.generate("hello", {name: 7, "ignore_eos": True})
    assert len(chat.replies[0].tokens) == 7
    assert chat.replies[0].finish_reason == "length"


def test_settings_come_from_the_call_then_chat_config_then_the_folder(load, tiny, tmp_path):
    folder = shutil.copytree(tiny.folder, tmp_path / "folder")
    file = folder / "mlc-chat-config.json"
    content = file.read_text().replace('"temperature": 1.0', '"temperature": 0.25')
    file.write_text(content.replace('"top_p": 1.0', '"top_p": 0.5'))
    chat = load(folder, chat_config={"top_p": 0.75, "max_gen_len": 33})
    settings = chat.settings({"frequency_penalty": 1.5})
    assert settings.temperature == 0.25
    assert settings.top_p == 0.75
    assert settings.max_tokens == 33
    assert settings.frequency_penalty == 1.5
    assert chat.settings({"max_tokens": 5}).max_tokens == 5


# Streaming from another thread, cancelling, and callbacks that fail


def in_thread(chat: ChatModule, *arguments, **options) -> tuple[threading.Thread, list]:
    """Generate in a thread; errors go to a list."""
    errors: list[BaseException] = []

    def generate() -> None:
        try:
            chat.generate(*arguments, **options)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    return thread, errors


def test_a_stream_iterator_gets_the_reply_of_a_thread(chat):
    expected = chat.generate("hello", GREEDY, stateless=True)
    stream = StreamIterator(callback_interval=2)
    thread, errors = in_thread(chat, "hello", GREEDY, progress_callback=stream)
    assert "".join(stream) == expected
    thread.join()
    assert not errors


@pytest.mark.parametrize(
    ("prompt", "settings", "error"),
    [("hello", {"temperature": -1}, RequestError), ("hello " * 300, {}, ContextOverflowError)],
)
def test_a_stream_iterator_raises_the_error_of_a_thread(chat, prompt, settings, error):
    stream = StreamIterator()
    thread, errors = in_thread(chat, prompt, settings, progress_callback=stream)
    with pytest.raises(error):
        list(stream)
    thread.join()
    assert [type(e) for e in errors] == [error]


def test_a_cancelled_reply_stays_in_the_conversation(chat, load, digits):
    recorder = Recorder(lambda text: recorder.cancel() if len(recorder.pieces) == 4 else None)
    text = chat.generate("hello", {**digits, "max_tokens": 40}, recorder)
    assert len(text) == len(chat.replies[0].tokens) == 4
    assert chat.replies[0].finish_reason == "cancelled"
    assert chat.messages == [say("user", "hello"), say("assistant", text)]
    held = chat.timings.prompt_tokens + 3
    expected = load().generate([*chat.messages, say("user", "and?")], digits)
    assert chat.generate("and?", digits, recorder) == expected  # not cancelled again
    assert chat.timings.reused_tokens == held


def test_a_reply_cancelled_before_its_first_token_was_never_asked_for(chat, digits):
    chat.generate("hello", digits)
    before = list(chat.messages)
    recorder = Recorder()
    recorder.cancel()
    assert chat.generate("and?", digits, recorder) == ""
    assert (chat.messages, recorder.ends) == (before, [None])
    chat.sequences.check()
    assert chat.generate("and?", digits) != ""


def test_an_error_in_a_callback_is_raised_and_the_module_goes_on(chat, load, digits):
    chat.generate("hello", digits)
    before = list(chat.messages)

    def fail(text: str) -> None:
        raise ZeroDivisionError("mine")

    recorder = Recorder(fail)
    with pytest.raises(ZeroDivisionError, match="mine"):
        chat.generate("and?", digits, recorder)
    assert [type(end) for end in recorder.ends] == [ZeroDivisionError]
    assert chat.messages == before
    assert free_pages(chat) == chat.sequences.pool.total
    expected = load().generate([*before, say("user", "and?")], digits)
    assert chat.generate("and?", digits) == expected


def test_the_first_error_is_raised_when_a_callback_fails_twice(chat):
    class Broken(Recorder):
        def ended(self, error: BaseException | None) -> None:
            raise OSError("ended")

    def fail(text: str) -> None:
        raise ZeroDivisionError("text")

    with pytest.raises(ZeroDivisionError, match="text"):
        chat.generate("hello", GREEDY, Broken(fail))
    assert free_pages(chat) == chat.sequences.pool.total
