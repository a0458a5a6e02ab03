"""Log probabilities as the two kinds of replies show them."""

from collections.abc import Callable, Iterable, Sequence

from relaxlm.openai_api.replies import CompletionLogprobs, TokenLogprob, TopLogprob
from relaxlm.runtime.sampling import Sampled
from relaxlm.runtime.tokenizer import Tokenizer

TokenBytes = Callable[[int], bytes]


def chat_logprobs(token_bytes: TokenBytes, tokens: Iterable[Sampled]) -> list[TokenLogprob]:
    """One entry per token, in the shape of chat completions."""
    found = []
    for sampled in tokens:
        assert sampled.logprob is not None
        own = _entry(token_bytes, sampled.token, sampled.logprob)
        top = [_entry(token_bytes, token, logprob) for token, logprob in sampled.top]
        found.append(
            TokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top)
        )
    return found


def _entry(token_bytes: TokenBytes, token: int, logprob: float) -> TopLogprob:
    data = token_bytes(token)
    return TopLogprob(token=data.decode("utf-8", "replace"), logprob=logprob, bytes=list(data))


class LogprobWriter:
    """Log probabilities of one choice of /v1/completions, token by token.

    Args:
        top: whether the most probable tokens were asked for, too.
    """

    def __init__(self, tokenizer: Tokenizer, token_bytes: TokenBytes, top: bool) -> None:
        self._token_bytes, self._top = token_bytes, top
        self._decoder = tokenizer.stream(skip_special_tokens=True, continuing=True)
        self._shown = tokenizer.stream(skip_special_tokens=False, continuing=True)
        self._offset = 0

    def prompt(
        self, ids: Sequence[int], logprobs: Sequence[Sampled], hidden: int
    ) -> CompletionLogprobs:
        """Of an echoed prompt, whose first token has none.

        Args:
            hidden: how many of its first tokens are not part of the echoed text.
        """
        entries = self._empty()
        for i, token in enumerate(ids):
            sampled = logprobs[i - 1] if i else Sampled(token, None, ())
            text = "" if i < hidden else self._shown.push([token])
            self._add(entries, sampled, text)
        return entries

    def reply(self, tokens: Iterable[Sampled]) -> CompletionLogprobs:
        """Of the next tokens of the reply."""
        entries = self._empty()
        for sampled in tokens:
            self._add(entries, sampled, self._decoder.push([sampled.token]))
        return entries

    def _empty(self) -> CompletionLogprobs:
        return CompletionLogprobs(
            tokens=[], token_logprobs=[], top_logprobs=[] if self._top else None, text_offset=[]
        )

    def _add(self, entries: CompletionLogprobs, sampled: Sampled, text: str) -> None:
        entries.tokens.append(_spelled(self._token_bytes, sampled.token))
        entries.token_logprobs.append(sampled.logprob)
        entries.text_offset.append(self._offset)
        self._offset += len(text)
        if entries.top_logprobs is not None:
            entries.top_logprobs.append(self._best(sampled))

    def _best(self, sampled: Sampled) -> dict[str, float] | None:
        if sampled.logprob is None:
            return None
        best: dict[str, float] = {}
        # OpenAI's has the chosen token, too, and two tokens may be spelled the same.
        for token, logprob in (*sampled.top, (sampled.token, sampled.logprob)):
            best.setdefault(_spelled(self._token_bytes, token), logprob)
        return best


def _spelled(token_bytes: TokenBytes, token: int) -> str:
    data = token_bytes(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def join_logprobs(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs | None:
    """The entries of several chunks in one; None of none."""
    if not parts:
        return None
    first = parts[0]
    return CompletionLogprobs(
        tokens=[token for part in parts for token in part.tokens],
        token_logprobs=[value for part in parts for value in part.token_logprobs],
        top_logprobs=None
        if first.top_logprobs is None
        else [best for part in parts for best in part.top_logprobs or ()],
        text_offset=[offset for part in parts for offset in part.text_offset],
    )
