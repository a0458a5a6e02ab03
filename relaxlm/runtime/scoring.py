"""How probable a model finds a text: the measure of what quantization and cache formats cost."""

from collections.abc import Iterator, Sequence

import numpy as np

from relaxlm.runtime.generator import Generator


def token_logits(generator: Generator, ids: Sequence[int]) -> Iterator[np.ndarray]:
    """The logits behind every token of a text, in pieces.

    The tokens pass through the KV cache, so that its format counts, in a sequence of their own. A
    step returns `max_batch_size` rows of logits at most, and is cut to as many tokens.

    Args:
        ids: [n] the text, at most as many tokens as there are free pages for.

    Yields:
        [m, vocab] float32 for the next m tokens; row i are the logits of the token after it.

    Raises:
        ContextOverflowError: too few pages are free.
        RequestError: a token id outside the vocabulary.
    """
    limits = generator.executor.limits
    rows = min(limits.max_batch_size, limits.prefill_chunk_size)
    seq = generator.sequences.add()
    try:
        for start in range(0, len(ids), rows):
            piece = np.asarray(ids[start : start + rows], np.int32)
            places = np.arange(len(piece), dtype=np.int32)
            yield generator.step([(seq, len(piece))], piece, places).all()
    finally:
        generator.sequences.free(seq)


def token_logprobs(generator: Generator, ids: Sequence[int]) -> np.ndarray:
    """The log probability of each token of a text given those before it.

    Args:
        ids: [n], n at least 2; as for `token_logits`.

    Returns:
        [n - 1] float64, natural logarithms: of ids[1], ids[2] and so on. Minus their mean is the
        negative log-likelihood (NLL) per token; its exponential is the perplexity.
    """
    if len(ids) < 2:
        raise ValueError(f"a text of {len(ids)} tokens predicts nothing, expected at least 2")
    tokens = np.asarray(ids, np.int64)
    found, start = [], 0
    for logits in token_logits(generator, ids):
        following = tokens[start + 1 : start + len(logits) + 1]
        start += len(logits)
        values = logits[: len(following)].astype(np.float64)
        values -= values.max(-1, keepdims=True)
        chosen = values[np.arange(len(following)), following]
        found.append(chosen - np.log(np.exp(values).sum(-1)))
    return np.concatenate(found)
