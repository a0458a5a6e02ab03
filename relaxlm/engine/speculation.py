"""Guesses what comes next from what a reply has said before.

Prompt lookup decoding: where the last tokens of prompt and reply stood earlier, the tokens behind
them are the guess. It is checked by the model in one step (`EngineCore`), so it changes only the
speed: for the better where a reply quotes its prompt (code, summaries, extraction), and hardly at
all elsewhere, because a reply whose guesses fail rests from guessing.

Source: A. Saxena, "Prompt Lookup Decoding" (2023); transformers' `prompt_lookup_num_tokens`.
"""

from dataclasses import dataclass

import numpy as np

from relaxlm.engine.job import Branch

# Steps without a guess after guesses that failed: doubles with each, up to this.
_LONGEST_REST = 32


@dataclass(frozen=True)
class NgramDrafts:
    """
    Attributes:
        tokens: the longest guess.
        longest, shortest: how many last tokens must have stood earlier; longer ones first.
    """

    tokens: int = 4
    longest: int = 4
    shortest: int = 2

    def propose(self, branch: Branch, most: int) -> list[int]:
        """Up to `most` tokens that may follow a reply; often none."""
        # A grammar's mask for the second token would have to wait for the first.
        if branch.generated == 0 or branch.job.request.grammar is not None:
            return []
        if branch.rest:
            branch.rest -= 1
            return []
        ids = np.frombuffer(branch.ids, np.int32)
        return follow_up(ids, min(self.tokens, most), self.longest, self.shortest)

    def learn(self, branch: Branch, drafted: int, accepted: int) -> None:
        """Guess less often where guesses fail."""
        if accepted:
            branch.misses = 0
            return
        branch.misses += 1
        branch.rest = min(2**branch.misses, _LONGEST_REST)


def follow_up(ids: np.ndarray, count: int, longest: int, shortest: int) -> list[int]:
    """What stood behind the latest earlier place of the last tokens.

    Args:
        ids: [n] int32.
        count: the most tokens to return.
        longest, shortest: lengths of the last tokens that are looked for, longest first.
    """
    if count < 1 or len(ids) <= shortest:
        return []
    # Places that end like the text; longer matches are among the shorter ones.
    last = len(ids) - 1
    ends = np.flatnonzero(ids[:last] == ids[last])
    best: list[int] = []
    for length in range(2, min(longest, last) + 1):
        ends = ends[ends >= length - 1]
        ends = ends[ids[ends - (length - 1)] == ids[last - (length - 1)]]
        if not len(ends):
            break
        if length >= shortest:
            best = ids[ends[-1] + 1 : ends[-1] + 1 + count].tolist()
    return best
