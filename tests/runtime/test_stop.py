import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relaxlm.errors import RequestError
from relaxlm.runtime.stop import StopStrings


def stream(pieces: list[str], stops: list[str]) -> tuple[list[str], StopStrings]:
    """What each push passes on, the flush at the end included."""
    machine = StopStrings(stops)
    emitted = []
    for piece in pieces:
        text, stopped = machine.push(piece)
        emitted.append(text)
        assert stopped == machine.stopped
    return [*emitted, machine.flush()], machine


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character: the first end of a stop string, and the longest that ends there."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize(
    ("pieces", "stops", "emitted", "matched"),
    [
        (["Hel", "lo", " world"], [], ["Hel", "lo", " world", ""], None),
        (["a<", "|e", "nd", "|>b"], ["<|end|>"], ["a", "", "", "", ""], "<|end|>"),
        (["a<|", "enx"], ["<|end|>"], ["a", "<|enx", ""], None),
        (["a<|en"], ["<|end|>"], ["a", "<|en"], None),
        (["aaab"], ["aab"], ["a", ""], "aab"),
        (["aa", "ab"], ["aab"], ["", "a", ""], "aab"),
        (["xab", "cd"], ["abcd", "bc"], ["x", "a", ""], "bc"),  # complete first
        (["xabc"], ["bc", "abc", "c"], ["x", ""], "abc"),  # complete at once: the longest
        (["one\n", "\ntwo"], ["\n\n"], ["one", "", ""], "\n\n"),
        (["né", "e\u0301 ", "日", "本"], ["日本"], ["né", "e\u0301 ", "", "", ""], "日本"),
        (["🙂", "🙃"], ["🙃"], ["🙂", "", ""], "🙃"),
        (["a", "", "b"], ["ab"], ["", "", "", ""], "ab"),
        (["stop", "more"], ["stop"], ["", "", ""], "stop"),
    ],
)
def test_examples(pieces: list[str], stops: list[str], emitted: list[str], matched: str) -> None:
    found, machine = stream(pieces, stops)
    assert found == emitted
    assert machine.matched == matched


def test_nothing_follows_a_stop() -> None:
    machine = StopStrings(["."])
    assert machine.push("a.b") == ("a", True)
    assert machine.push("c") == ("", True)
    assert machine.flush() == ""


def test_held_text_is_released_once() -> None:
    machine = StopStrings(["ab"])
    machine.push("a")
    assert (machine.flush(), machine.flush()) == ("a", "")


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(
        RequestError, match=r"^a stop string is empty: expected at least one character$"
    ):
        StopStrings(["a", ""])


words = st.text(alphabet="ab🙂", min_size=1, max_size=5)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.text(alphabet="ab🙂", max_size=6), max_size=8), st.lists(words, max_size=4))
def test_any_pieces_give_the_text_up_to_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    expected, matched = reference(text, stops)
    emitted, machine = stream(pieces, stops)
    assert "".join(emitted) == expected
    assert machine.matched == matched


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(alphabet="ab🙂", max_size=6), max_size=8), st.lists(words, max_size=4))
def test_text_is_held_back_only_while_it_may_become_a_stop(
    pieces: list[str], stops: list[str]
) -> None:
    machine = StopStrings(stops)
    pushed = emitted = ""
    for piece in pieces:
        pushed += piece
        text, stopped = machine.push(piece)
        emitted += text
        if stopped:
            break
        held = pushed[len(emitted) :]
        starts = [n for n in range(len(pushed) + 1) for s in stops if s.startswith(pushed[n:])]
        assert len(held) == len(pushed) - min(starts, default=len(pushed))
