"""Prompts of a wanted number of tokens, for a server whose tokenizer is not at hand.

A prompt is a row of common words. What each costs is asked of the server's tokenizer, if it has a
route to it, and what surrounds the row in a chat is found by asking for one reply.
"""

import random
from dataclasses import replace

from relaxlm.errors import RequestError
from relaxlm.profiling.serving_client import Dialect, Route, Server, ServerError, exchange

# Short and common: one token each in most vocabularies, which is assumed of a server that does not
# tell. Marks cost one token even where few words do.
_WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city name team minute idea body back parent face others level office door "
    "health person art war history party result change morning reason research girl guy moment air "
    "teacher force education foot boy age policy music market sense nation plan college interest "
    ", . ; : ! ?"
).split()
_START = "Continue"
_PROBED = 16  # words of the prompts that are sent to learn from
_FEW_TOKENS = 2

# Routes to a tokenizer and the name of the text there: relaxlm's and vLLM's, llama.cpp's, and
# llama-cpp-python's.
_TOKENIZERS = (
    ("/tokenize", "prompt"),
    ("/tokenize", "content"),
    ("/extras/tokenize", "input"),
)


class Prompts:
    """Makes prompts that no server has seen.

    Attributes:
        exact: the server's tokenizer counted the words.
        overhead: tokens of a prompt before and around its words.
    """

    def __init__(
        self, costs: dict[str, int], overhead: int, exact: bool, random: random.Random
    ) -> None:
        self.overhead, self.exact = overhead, exact
        self._costs, self._random = costs, random
        self._words, self._each = list(costs), set(costs.values())
        self._sums = [True]  # which numbers of tokens words can have together
        self._shared = ("", 0)

    def share(self, tokens: int) -> None:
        """Let all further prompts begin with the same words, of this many tokens in all."""
        self._shared = self.row(tokens)

    def make(self, tokens: int) -> str:
        """Text of a prompt of that many tokens, overhead included, or a few less where the words
        do not fit. It has one word at least."""
        shared, taken = self._shared
        row, _ = self.row(max(tokens - self.overhead - taken, min(self._each)))
        return f"{_START}{shared}{row}"

    def row(self, tokens: int) -> tuple[str, int]:
        """Words of that many tokens in all, or a few less, and how many they are."""
        while not self._possible(tokens):
            tokens -= 1
        words, left = [], tokens
        while left:
            word = self._random.choice(self._words)
            cost = self._costs[word]
            if self._possible(left - cost):
                words.append(" " + word)
                left -= cost
        return "".join(words), tokens

    def _possible(self, tokens: int) -> bool:
        """Whether words can cost so much together."""
        for total in range(len(self._sums), tokens + 1):
            self._sums.append(any(c <= total and self._sums[total - c] for c in self._each))
        return tokens >= 0 and self._sums[tokens]


async def get_to_know(
    server: Server, model: str | None, route: Route, limit: float, random: random.Random
) -> tuple[Dialect, Prompts]:
    """Find out what a server is called, what it understands and how it counts.

    Args:
        model: its name; None: the first that it lists.
        limit: seconds for each answer.

    Raises:
        RequestError: it can't be reached, or gives no reply.
    """
    if model is None:
        try:
            listed = await server.call("GET", f"{server.path}/models")
            model = listed["data"][0]["id"]
        except (OSError, ServerError, LookupError, TypeError) as error:
            raise RequestError(
                f"{server.url}/models gives no model's name ({error}): is the server running, and "
                "is this its address? --model NAME does without"
            ) from error
    costs, exact = await _costs(server)
    plain = Prompts(costs, 0, exact, random)
    row, taken = plain.row(_PROBED)
    dialect = Dialect(model, route)
    while True:
        made = await exchange(server, dialect, _START + row, taken + 1, _FEW_TOKENS, limit)
        if "ignore_eos" in made.error and dialect.extensions:
            dialect = replace(dialect, extensions={})
        elif "stream_options" in made.error and dialect.counts_stream:
            dialect = replace(dialect, counts_stream=False)
        elif made.error:
            raise RequestError(f"{server.url}: no reply to a short prompt: {made.error}")
        else:
            return dialect, Prompts(costs, made.prompt_tokens - taken, exact, random)


async def _costs(server: Server) -> tuple[dict[str, int], bool]:
    """What each word costs in tokens, and whether the server said so."""
    for path, field in _TOKENIZERS:
        try:
            return {word: await _cost(server, path, field, word) for word in _WORDS}, True
        except (OSError, ServerError, LookupError, TypeError):
            continue
    return dict.fromkeys(_WORDS, 1), False


async def _cost(server: Server, path: str, field: str, word: str) -> int:
    # What a tokenizer puts around every text does not count.
    short, long = [
        len((await server.call("POST", path, {field: text}))["tokens"])
        for text in (_START, f"{_START} {word}")
    ]
    if long <= short:
        raise LookupError(f"{path}: {word!r} costs nothing")
    return long - short
