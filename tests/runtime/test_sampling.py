import math
import random
import re

import numpy as np
import pytest

from relaxlm.errors import LibraryError
from relaxlm.runtime.generation import GenerationConfig, SamplingState
from relaxlm.runtime.sampling import Sampled, sample


def reference(
    row: np.ndarray,
    config: GenerationConfig,
    prompt: list[int],
    reply: list[int],
    rng,
    allowed: set[int] | None = None,
) -> int:
    """Token by token, in Python's floats; sorts everything."""
    logits = [float(x) for x in row]
    if allowed is not None:
        logits = [x if i in allowed else -math.inf for i, x in enumerate(logits)]
    for token, bias in config.logit_bias.items():
        logits[token] += bias
    for token in {*prompt, *reply}:
        if logits[token] > 0:
            logits[token] /= config.repetition_penalty
        else:
            logits[token] *= config.repetition_penalty
    for token in set(reply):
        logits[token] -= config.presence_penalty + config.frequency_penalty * reply.count(token)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if config.temperature == 0:
        return order[0]
    largest = logits[order[0]]
    weights = [math.exp((x - largest) / config.temperature) for x in logits]
    if config.top_k:
        order = order[: config.top_k]
    if config.top_p < 1:
        target = config.top_p * math.fsum(weights[i] for i in order)
        kept = 1
        while kept < len(order) and math.fsum(weights[i] for i in order[:kept]) < target:
            kept += 1
        order = order[:kept]
    order = sorted(i for i in order if weights[i] >= config.min_p)
    total = 0.0
    for i in order:
        total += weights[i]
    target, reached = rng.random() * total, 0.0
    for i in order:
        reached += weights[i]
        if reached > target:
            return i
    raise AssertionError("no token")


def generator(seed: int, choice: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, choice])))


def bit_mask(allowed: set[int], vocab: int) -> np.ndarray:
    words = np.zeros(-(-vocab // 32), np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words


def random_row(rng: np.random.Generator, vocab: int) -> np.ndarray:
    kind = rng.integers(5)
    row = rng.standard_normal(vocab) * rng.choice([0.1, 2, 30])
    if kind == 0:  # ties
        row = np.round(row)
    elif kind == 1:
        row[:] = row[0]
    elif kind == 2 and vocab > 1:
        row[rng.permutation(vocab)[: vocab // 2]] = -np.inf
    elif kind == 3:
        row[rng.integers(vocab)] += 50
    return row.astype(np.float32)


def random_config(rng: random.Random, vocab: int) -> GenerationConfig:
    def maybe(*values):
        return rng.choice([None, *values])

    return GenerationConfig(
        temperature=maybe(0, 0.3, 0.7, 1.5, 5e-324, 1e-300, 1e-5, 1e300),
        top_k=maybe(1, 2, 5, vocab - 1 or 1, vocab, vocab + 1),
        top_p=maybe(0.0, 1e-9, 0.1, 0.5, 0.9, 1 - 1e-9, 1 - 2**-53, rng.random()),
        min_p=maybe(1e-9, 0.05, 0.5, 1.0, rng.random()),
        repetition_penalty=maybe(0.01, 0.5, 1.1, 100.0),
        presence_penalty=maybe(-2, 0.5, 2),
        frequency_penalty=maybe(-2, 0.3, 2),
        logit_bias=maybe({rng.randrange(vocab): rng.uniform(-100, 100) for _ in range(3)}),
        seed=rng.randrange(2**64),
    )


@pytest.mark.parametrize("seed", range(8))
def test_tokens_are_those_of_the_reference(seed: int) -> None:
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    for _ in range(150):
        vocab = rng.choice([1, 2, 3, 10, 64, 200])
        config = random_config(rng, vocab)
        prompt = [rng.randrange(vocab) for _ in range(rng.randrange(6))]
        state = SamplingState(config, prompt, vocab)
        draw, reply = generator(config.seed), []
        for _ in range(6):
            row = random_row(numbers, vocab)
            given = row.copy()
            allowed = None
            if rng.random() < 0.3:
                finite = np.flatnonzero(row > -np.inf).tolist()
                allowed = {rng.choice(finite), *rng.sample(range(vocab), rng.randint(0, vocab))}
            state.mask = None if allowed is None else bit_mask(allowed, vocab)
            expected = reference(row, config, prompt, reply, draw, allowed)
            assert sample(row[None], [state])[0].token == expected, (config, row, reply)
            np.testing.assert_array_equal(row, given)
            reply.append(expected)


def test_the_steps_are_those_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    rng, numbers = random.Random(0), np.random.default_rng(0)
    vocab = 50
    for _ in range(200):
        fields = {
            "repetition_penalty": rng.choice([0.7, 1.2]),
            "temperature": rng.choice([0.5, 1.3]),
            "top_k": rng.choice([3, 10, 40]),
            "top_p": rng.choice([0.3, 0.8, 0.95]),
            "min_p": rng.choice([0.01, 0.1, 0.4]),
        }
        row = (2 * numbers.standard_normal((1, vocab))).astype(np.float32)
        prompt = [rng.randrange(vocab) for _ in range(10)]
        scores = torch.tensor(row, dtype=torch.float64)
        for step in (
            logits_process.RepetitionPenaltyLogitsProcessor(fields["repetition_penalty"]),
            logits_process.TemperatureLogitsWarper(fields["temperature"]),
            logits_process.TopKLogitsWarper(fields["top_k"]),
            logits_process.TopPLogitsWarper(fields["top_p"]),
            logits_process.MinPLogitsWarper(fields["min_p"]),
        ):
            scores = step(torch.tensor([prompt]), scores)
        sums = torch.softmax(scores, -1)[0].cumsum(0).numpy()
        seed = rng.randrange(1000)
        expected = int(np.searchsorted(sums, generator(seed).random(), side="right"))
        state = SamplingState(GenerationConfig(seed=seed, **fields), prompt, vocab)
        assert sample(row, [state])[0].token == expected


@pytest.mark.parametrize("kind", ["peaked", "flat", "ties", "equal"])
def test_a_large_vocabulary_is_cut_where_a_full_sort_cuts_it(kind: str) -> None:
    """The same as above with NumPy in place of loops, for a size at which shortcuts matter."""
    vocab = 151_936
    numbers = np.random.default_rng(3)
    for top_k, top_p in ((0, 0.9), (0, 0.3), (40, 1.0), (5000, 0.8), (1, 0.5)):
        row = numbers.standard_normal(vocab).astype(np.float32)
        if kind == "peaked":
            row = 3 * row
            row[numbers.integers(0, vocab, 20)] += 15
        elif kind == "ties":
            row = np.round(4 * row)
        elif kind == "equal":
            row[:] = 1.5
        config = GenerationConfig(top_k=top_k, top_p=top_p, temperature=0.8, seed=11)
        order = np.argsort(-row, kind="stable")[: top_k or vocab]
        weights = np.exp((row[order].astype(np.float64) - row.max()) / 0.8)
        kept = np.searchsorted(np.cumsum(weights), top_p * math.fsum(weights)) + 1
        by_id = np.argsort(order[:kept])
        sums = np.cumsum(weights[:kept][by_id])
        state, draw = SamplingState(config, [], vocab), generator(11)
        for _ in range(5):
            place = np.searchsorted(sums, draw.random() * sums[-1], side="right")
            assert sample(row[None], [state])[0].token == order[:kept][by_id][place]


def test_draws_follow_the_probabilities() -> None:
    row = np.log(np.array([[0.4, 0.1, 0.05, 0.25, 0.15, 0.05]], np.float32))
    config = GenerationConfig(top_p=0.89, seed=1)  # 0.4 + 0.25 + 0.15 + 0.1 reach it
    state = SamplingState(config, [], 6)
    draws = 20_000
    counts = np.bincount([sample(row, [state])[0].token for _ in range(draws)], minlength=6)
    assert counts[2] == counts[5] == 0
    expected = draws * np.array([0.4, 0.1, 0.25, 0.15]) / 0.9
    chi_square = ((counts[[0, 1, 3, 4]] - expected) ** 2 / expected).sum()
    assert chi_square < 16.27  # exceeded once in a thousand, with 3 degrees of freedom


def test_a_request_gets_the_same_tokens_in_any_company() -> None:
    numbers = np.random.default_rng(0)
    vocab, steps = 500, 12
    rows = (3 * numbers.standard_normal((steps, 6, vocab))).astype(np.float32)
    configs = [
        GenerationConfig(seed=seed, **fields)
        for seed, fields in enumerate(
            [
                {"temperature": 0},
                {"top_p": 0.9},
                {"top_k": 20, "repetition_penalty": 1.3},
                {"min_p": 0.02, "frequency_penalty": 1.0},
                {},
                {"logit_bias": {4: 5.0}, "top_p": 0.5},
            ]
        )
    ]

    def run(members: list[int], widest: int) -> dict[int, list[int]]:
        states = {i: SamplingState(configs[i], [1, 2], vocab) for i in members}
        tokens: dict[int, list[int]] = {i: [] for i in members}
        for step in range(steps):
            logits = np.full((len(members), widest), np.nan, np.float32)
            logits[:, :vocab] = rows[step, members]
            for i, got in zip(members, sample(logits, list(states.values())), strict=True):
                tokens[i].append(got.token)
        return tokens

    alone = {i: run([i], vocab)[i] for i in range(6)}
    assert run([0, 1, 2, 3, 4, 5], vocab) == alone
    assert run([5, 3, 1], vocab + 7) == {i: alone[i] for i in (5, 3, 1)}  # padded logits
    assert len({tuple(tokens) for tokens in alone.values()}) == 6


def test_choices_of_one_request_differ() -> None:
    row = np.zeros((3, 1000), np.float32)
    states = [SamplingState(GenerationConfig(seed=4, n=3), [], 1000, i) for i in range(3)]
    assert len({got.token for got in sample(row, states)}) == 3


def test_padding_is_never_chosen() -> None:
    row = np.array([[1.0, 3.0, 2.0, 9.0]], np.float32)
    greedy = SamplingState(GenerationConfig(temperature=0), [], 3)
    assert sample(row, [greedy])[0].token == 1
    state = SamplingState(GenerationConfig(temperature=100.0, seed=0), [], 3)
    assert {sample(row, [state])[0].token for _ in range(100)} == {0, 1, 2}


def test_the_lower_id_wins_a_tie() -> None:
    row = np.array([[0.0, 2.0, 1.0, 2.0, 2.0]], np.float32)
    for fields in ({"temperature": 0}, {"top_k": 1}, {"top_p": 0.0}, {"top_p": 0.2}):
        state = SamplingState(GenerationConfig(seed=2, **fields), [], 5)
        assert {sample(row, [state])[0].token for _ in range(20)} == {1}, fields
    state = SamplingState(GenerationConfig(seed=2, top_k=2), [], 5)
    assert {sample(row, [state])[0].token for _ in range(50)} == {1, 3}


@pytest.mark.parametrize(
    ("number", "token"),
    [(0.0, 1), (1.0, 2)],  # 1 cannot come, but products with slightly less are rounded up to it
)
def test_the_extreme_random_numbers_pick_possible_tokens(number: float, token: int) -> None:
    class Fixed(SamplingState):
        def uniform(self) -> float:
            return number

    row = np.array([[-np.inf, 0.0, 1.0, -np.inf]], np.float32)
    assert sample(row, [Fixed(GenerationConfig(), [], 4)])[0].token == token


def test_penalties_by_hand() -> None:
    """A repetition penalty on prompt and reply, the others on the reply."""
    row = np.array([[4.0, 3.5, -1.0, -1.5]], np.float32)
    greedy = {"temperature": 0}
    # 4 / 1.2 = 3.3 < 3.5
    state = SamplingState(GenerationConfig(repetition_penalty=1.2, **greedy), [0], 4)
    assert [sample(row, [state])[0].token for _ in range(3)] == [1, 0, 0]
    # -1 * 2 = -2 < -1.5
    state = SamplingState(GenerationConfig(repetition_penalty=2.0, **greedy), [2], 4)
    assert sample(row[:, 2:], [SamplingState(state.config, [0], 2)])[0].token == 1
    # The prompt's token 0 is not counted; 4 - 0.6 < 3.5 once it was said.
    state = SamplingState(GenerationConfig(presence_penalty=0.6, **greedy), [0], 4)
    assert [sample(row, [state])[0].token for _ in range(4)] == [0, 1, 0, 0]
    # 4, 3.5 | 3.7, 3.5 | 3.4, 3.5 | 3.4, 3.2
    state = SamplingState(GenerationConfig(frequency_penalty=0.3, **greedy), [0], 4)
    assert [sample(row, [state])[0].token for _ in range(4)] == [0, 0, 1, 0]


def test_a_bias_comes_before_the_penalties() -> None:
    row = np.array([[1.0, 1.5]], np.float32)
    # (1 + 1.9) / 2 < 1.5, but 1 / 2 + 1.9 would win.
    config = GenerationConfig(temperature=0, logit_bias={0: 1.9}, repetition_penalty=2.0)
    assert sample(row, [SamplingState(config, [0], 2)])[0].token == 1


def test_log_probabilities_are_those_of_the_model() -> None:
    row = np.array([[2.0, 1.0, 2.0, -np.inf, 9.0]], np.float32)
    config = GenerationConfig(
        temperature=0, logit_bias={1: 50}, logprobs=True, top_logprobs=20, presence_penalty=1
    )
    got = sample(row, [SamplingState(config, [], 4)])[0]
    norm = math.log(2 * math.exp(2) + math.exp(1))
    assert got.token == 1
    assert got.logprob == pytest.approx(1 - norm, abs=1e-12)
    assert [token for token, _ in got.top] == [0, 2, 1]  # -inf has no place among them
    assert [logprob for _, logprob in got.top] == pytest.approx(
        [2 - norm, 2 - norm, 1 - norm], abs=1e-12
    )
    config = GenerationConfig(temperature=0, logprobs=True)
    assert sample(row, [SamplingState(config, [], 4)])[0] == Sampled(
        0, pytest.approx(2 - norm, abs=1e-12), ()
    )
    assert sample(row, [SamplingState(GenerationConfig(), [], 4)])[0][1:] == (None, ())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_comes_before_everything_but_the_log_probabilities(temperature: float) -> None:
    """The only allowed token is chosen, whatever speaks against it."""
    row = np.array([[9.0, 8.0, -5.0, 7.0] + [6.0] * 66], np.float32)
    config = GenerationConfig(
        temperature=temperature,
        top_k=1,
        top_p=0.1,
        logit_bias={0: 100, 2: -100, 69: 100},
        repetition_penalty=2.0,
        logprobs=True,
        top_logprobs=2,
    )
    state = SamplingState(config, [2], 70)
    norm = math.log(np.exp(row.astype(float)).sum())
    for token in (2, 68, 2):
        state.mask = bit_mask({token}, 70)
        (got,) = sample(row, [state])
        assert got.token == token
        assert got.logprob == pytest.approx(float(row[0, token]) - norm, abs=1e-12)
        assert [token for token, _ in got.top] == [0, 1]
    state.mask = None
    assert sample(row, [state])[0].token in (0, 69)


NOT_FINITE = (
    "the model computed {} in row 1 of its logits: expected finite numbers. Check the weights with "
    "`relaxlm verify`; if float16 is too narrow for this model, use a bfloat16 or float32 preset"
)
NONE_ALLOWED = (
    "no token may follow: the mask of row 1 of the logits forbids all 3 tokens, or all but those "
    "that the model rules out"
)


@pytest.mark.parametrize(
    ("values", "mask", "message"),
    [
        ([0.0, np.nan, 5.0], None, NOT_FINITE.format("nan for token 1")),
        ([0.0, np.nan, 5.0], {0, 2}, NOT_FINITE.format("nan for token 1")),
        ([0.0, 1.0, np.inf], None, NOT_FINITE.format("inf for token 2")),
        ([-np.inf] * 3, None, NOT_FINITE.format("no logit above -inf")),
        ([1.0, 2.0, 3.0], set(), NONE_ALLOWED),
        ([1.0, -np.inf, 3.0], {1}, NONE_ALLOWED),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_possible_token_fails_alone(
    values: list[float], mask: set[int] | None, message: str, temperature: float
) -> None:
    rows = np.array([[1.0, 2.0, 3.0], values, [-1e30, 5.0, -1e30]], np.float32)
    config = GenerationConfig(temperature=temperature, seed=0)
    states = [SamplingState(config, [], 3) for _ in range(3)]
    states[1].mask = None if mask is None else bit_mask(mask, 3)
    first, error, last = sample(rows, states)
    assert isinstance(first, Sampled) and isinstance(last, Sampled) and last.token == 1
    assert isinstance(error, LibraryError) and str(error) == message
    assert [state.generated for state in states] == [1, 0, 1]
    assert states[1].uniform() == generator(0).random()


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (np.zeros(1, np.int32), "int32 [1]"),
        (np.zeros(2, np.uint32), "uint32 [2]"),
        (np.zeros(0, np.uint32), "uint32 [0]"),
    ],
)
def test_masks_of_another_shape_are_refused(mask: np.ndarray, found: str) -> None:
    state = SamplingState(GenerationConfig(), [], 32)
    state.mask = mask
    message = f"a mask {found}: expected uint32 [1], a bit for each of 32 tokens"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sample(np.zeros((1, 32), np.float32), [state])


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (
            np.zeros((2, 4), np.float32),
            "logits float32 [2, 4] for 1 requests: expected float32 [1, vocab]",
        ),
        (
            np.zeros((1, 4), np.float16),
            "logits float16 [1, 4] for 1 requests: expected float32 [1, vocab]",
        ),
        (np.zeros(4, np.float32), "logits float32 [4] for 1 requests: expected float32 [1, vocab]"),
        (np.zeros((1, 3), np.float32), "logits for 3 tokens, and a vocabulary of 4 in row 0"),
    ],
)
def test_logits_of_another_shape_are_refused(logits: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sample(logits, [SamplingState(GenerationConfig(), [], 4)])
