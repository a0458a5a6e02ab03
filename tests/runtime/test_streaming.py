import io
import threading

import pytest

from relaxlm.errors import RequestError
from relaxlm.runtime.streaming import StreamCallback, StreamIterator, StreamToStdout


class Recorder(StreamCallback):
    def __init__(self, callback_interval: int = 1) -> None:
        super().__init__(callback_interval)
        self.events: list = []

    def text(self, delta: str) -> None:
        self.events.append(delta)

    def ended(self, error: BaseException | None) -> None:
        self.events.append(error)


def feed(callback: StreamCallback, pieces: list[str]) -> None:
    for piece in pieces:
        callback.on_token(piece)
    callback.on_end()


def test_text_is_passed_on_every_so_many_tokens_and_at_the_end():
    recorder = Recorder(callback_interval=3)
    feed(recorder, ["a", "", "b", "c", "d", "e", "f"])
    assert recorder.events == ["ab", "cde", "f", None]


def test_tokens_without_text_are_no_events():
    recorder = Recorder()
    feed(recorder, ["", "a", "", ""])
    assert recorder.events == ["a", None]


def test_a_callback_counts_anew_for_each_reply():
    recorder = Recorder(callback_interval=2)
    feed(recorder, ["a"])
    feed(recorder, ["b", "c"])
    assert recorder.events == ["a", None, "bc", None]


def test_the_text_before_an_error_arrives_before_the_error():
    recorder, error = Recorder(callback_interval=5), ValueError("no")
    recorder.on_token("a")
    recorder.on_end(error)
    assert recorder.events == ["a", error]


def test_a_callback_that_fails_is_told_of_the_end_and_starts_anew():
    class Failing(Recorder):
        def text(self, delta: str) -> None:
            super().text(delta)
            if delta == "bad":
                raise ValueError("full")

    recorder = Failing(callback_interval=2)
    recorder.on_token("bad")
    with pytest.raises(ValueError, match="full"):
        recorder.on_end()
    feed(recorder, ["a", "b"])
    assert recorder.events == ["bad", None, "ab", None]


def test_cancelling_lasts_until_the_end_of_the_reply():
    recorder = Recorder()
    recorder.cancel()
    assert recorder.cancelled
    recorder.on_end()
    assert not recorder.cancelled


def test_an_interval_below_one_is_refused():
    with pytest.raises(RequestError) as raised:
        StreamToStdout(callback_interval=0)
    assert str(raised.value) == "callback_interval = 0: expected a number of tokens from 1 on"


def test_to_stdout_writes_the_text_and_a_line_end(capsys):
    feed(StreamToStdout(callback_interval=2), ["Wörld", " ", "🙂"])
    assert capsys.readouterr().out == "Wörld 🙂\n"


def test_to_stdout_writes_to_another_stream_and_flushes_every_piece():
    class Flushed(io.StringIO):
        seen: list[str] = []  # noqa: RUF012

        def flush(self) -> None:
            self.seen.append(self.getvalue())

    stream = Flushed()
    feed(StreamToStdout(1, stream), ["a", "b"])
    assert stream.seen == ["a", "ab", "ab\n"]


def test_to_stdout_writes_nothing_for_a_request_that_failed_before_any_text(capsys):
    StreamToStdout().on_end(ValueError("no"))
    assert capsys.readouterr().out == ""


def test_an_iterator_gives_what_another_thread_feeds():
    stream = StreamIterator(callback_interval=2)
    thread = threading.Thread(target=feed, args=(stream, ["a", "b", "c"]))
    thread.start()
    assert list(stream) == ["ab", "c"]
    thread.join()


def test_an_iterator_raises_the_error_of_the_generation_after_its_text():
    stream = StreamIterator(callback_interval=1)
    stream.on_token("a")
    stream.on_end(RequestError("no"))
    pieces = iter(stream)
    assert next(pieces) == "a"
    with pytest.raises(RequestError, match=r"^no$"):
        next(pieces)
