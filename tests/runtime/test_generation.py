import copy
import pickle
import re

import numpy as np
import pytest

from relaxlm.errors import RequestError
from relaxlm.runtime.generation import GenerationConfig, SamplingState


def test_what_is_not_given_reads_as_off() -> None:
    config = GenerationConfig()
    assert config.model_dump() == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": None,
        "stop": (),
        "stop_token_ids": (),
        "seed": None,
        "logit_bias": {},
        "n": 1,
        "ignore_eos": False,
        "logprobs": False,
        "top_logprobs": 0,
    }
    assert config.model_fields_set == set()


def test_other_spellings() -> None:
    config = GenerationConfig(
        stop="\n", stop_token_ids=[2, 3], logit_bias={"7": -100}, top_k=-1, temperature=0
    )
    assert config.stop == ("\n",)
    assert config.stop_token_ids == (2, 3)
    assert config.logit_bias == {7: -100}
    assert config.top_k == 0 and config.temperature == 0


def test_max_gen_len_is_max_tokens() -> None:
    config = GenerationConfig(max_gen_len=5)
    assert config.max_tokens == config.max_gen_len == 5
    assert config == GenerationConfig(max_tokens=5) == GenerationConfig(max_tokens=5, max_gen_len=5)
    assert GenerationConfig(max_gen_len=5).merged({"max_tokens": 9}).max_tokens == 5
    assert GenerationConfig(max_gen_len=None).merged({"max_gen_len": 9}).max_tokens == 9


def test_merging_takes_set_fields_of_the_caller_then_of_the_defaults() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.9, "stop": ["a", "b"], "max_tokens": None}
    caller = GenerationConfig(temperature=1.0, top_p=None, stop="c")
    merged = caller.merged(defaults)
    assert (merged.temperature, merged.top_p, merged.stop) == (1.0, 0.9, ("c",))
    assert merged.model_fields_set == {"temperature", "top_p", "stop"}
    again = merged.merged(GenerationConfig(top_k=5, top_p=0.1))
    assert (again.top_p, again.top_k, again.min_p) == (0.9, 5, 0.0)


def test_what_is_set_survives_copies() -> None:
    config = GenerationConfig(top_p=1.0)
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied.merged({"top_p": 0.5}).top_p == 1.0


WHOLE = "a whole number, 1 or more"
BIAS = "token ids (0 to 2**31 - 1), each with a number from -100 to 100"
STOP = "a string or a list of strings, none of them empty"
IDS = "a list of token ids, whole numbers from 0 to 2**31 - 1"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"temperature": -1},
            "temperature = -1 is not possible: expected a number, 0 (greedy) or more",
        ),
        (
            {"temperature": float("nan")},
            "temperature = nan is not possible: expected a number, 0 (greedy) or more",
        ),
        (
            {"temperature": float("inf")},
            "temperature = inf is not possible: expected a number, 0 (greedy) or more",
        ),
        (
            {"temperature": "0.5"},
            "temperature = '0.5' is not possible: expected a number, 0 (greedy) or more",
        ),
        ({"top_p": 1.5}, "top_p = 1.5 is not possible: expected a number from 0 to 1"),
        ({"min_p": -0.1}, "min_p = -0.1 is not possible: expected a number from 0 to 1"),
        (
            {"top_k": -2},
            "top_k = -2 is not possible: expected a whole number, 1 or more, or 0 for all tokens",
        ),
        (
            {"top_k": 1.5, "top_p": 2},
            "top_p = 2 is not possible: expected a number from 0 to 1; "
            "top_k = 1.5 is not possible: expected a whole number, 1 or more, or 0 for all tokens",
        ),
        (
            {"repetition_penalty": 0},
            "repetition_penalty = 0 is not possible: expected a number from 0.01 to 100",
        ),
        (
            {"presence_penalty": 2.1},
            "presence_penalty = 2.1 is not possible: expected a number from -2 to 2",
        ),
        (
            {"frequency_penalty": True},
            "frequency_penalty = True is not possible: expected a number from -2 to 2",
        ),
        ({"max_tokens": 0}, f"max_tokens = 0 is not possible: expected {WHOLE}"),
        ({"max_gen_len": 2.0}, f"max_gen_len = 2.0 is not possible: expected {WHOLE}"),
        (
            {"max_tokens": 4, "max_gen_len": 3},
            "max_tokens = 4 and max_gen_len = 3 are two names of one limit: give one of them",
        ),
        ({"stop": ["a", ""]}, f"stop[1] = '' is not possible: expected {STOP}"),
        ({"stop": 5}, f"stop = 5 is not possible: expected {STOP}"),
        ({"stop_token_ids": [3, -1]}, f"stop_token_ids[1] = -1 is not possible: expected {IDS}"),
        ({"stop_token_ids": 3}, f"stop_token_ids = 3 is not possible: expected {IDS}"),
        (
            {"seed": 2**64},
            f"seed = {2**64} is not possible: expected a whole number from -2**63 to 2**64 - 1",
        ),
        ({"logit_bias": {"5": 101}}, f"logit_bias[5] = 101 is not possible: expected {BIAS}"),
        ({"logit_bias": {"x": 1}}, f"logit_bias['x'] = 'x' is not possible: expected {BIAS}"),
        ({"logit_bias": {-3: 1}}, f"logit_bias[-3] = -3 is not possible: expected {BIAS}"),
        ({"logit_bias": [1]}, f"logit_bias = [1] is not possible: expected {BIAS}"),
        ({"n": 0}, "n = 0 is not possible: expected a whole number from 1 to 128"),
        ({"n": 129}, "n = 129 is not possible: expected a whole number from 1 to 128"),
        ({"ignore_eos": 1}, "ignore_eos = 1 is not possible: expected true or false"),
        ({"logprobs": "yes"}, "logprobs = 'yes' is not possible: expected true or false"),
        (
            {"logprobs": True, "top_logprobs": 21},
            "top_logprobs = 21 is not possible: expected a whole number from 0 to 20",
        ),
        ({"top_logprobs": 3}, "top_logprobs = 3 needs logprobs = true"),
        (
            {"temprature": 1},
            "'temprature' is not a generation option: did you mean 'temperature'?",
        ),
        (
            {"foo": 1},
            "'foo' is not a generation option: expected one of temperature, top_p, top_k, min_p, "
            "repetition_penalty, presence_penalty, frequency_penalty, max_tokens, stop, "
            "stop_token_ids, seed, logit_bias, n, ignore_eos, logprobs, top_logprobs, max_gen_len",
        ),
    ],
)
def test_what_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        GenerationConfig(**fields)
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        GenerationConfig.model_validate(fields)


def test_every_field_says_what_it_expects() -> None:
    from relaxlm.runtime.generation import _EXPECTED

    assert list(_EXPECTED) == list(GenerationConfig.model_fields)


def test_the_state_counts_tokens() -> None:
    state = SamplingState(GenerationConfig(), [5, 3, 5], 10)
    for token in (7, 3, 7):
        state.accept(token)
    ids, counts = state.generated_counts()
    assert ids.tolist() == [7, 3] and counts.tolist() == [2, 1]
    assert state.seen().tolist() == [3, 5, 7]
    assert state.generated == 3


def test_an_empty_prompt_has_nothing_seen() -> None:
    state = SamplingState(GenerationConfig(), [], 10)
    assert len(state.seen()) == 0 and state.seen().dtype == np.int64


def test_random_numbers_depend_on_seed_and_choice_only() -> None:
    def draws(seed: int | None, choice: int = 0, prompt: tuple[int, ...] = ()) -> list[float]:
        state = SamplingState(GenerationConfig(seed=seed), prompt, 10, choice)
        return [state.uniform() for _ in range(3)]

    assert draws(5) == draws(5, prompt=(1, 2))
    assert draws(-1) == draws(2**64 - 1)
    different = [draws(5), draws(6), draws(5, 1), draws(-1), draws(None), draws(None)]
    assert len({tuple(numbers) for numbers in different}) == 6


@pytest.mark.parametrize(
    ("fields", "prompt", "what", "token"),
    [
        ({}, [1, 10], "the prompt", 10),
        ({}, [-1, 4], "the prompt", -1),
        ({"logit_bias": {3: 1, 11: 1}}, [], "logit_bias", 11),
        ({"stop_token_ids": [12]}, [], "stop_token_ids", 12),
    ],
)
def test_token_ids_outside_the_vocabulary_are_refused(
    fields: dict, prompt: list[int], what: str, token: int
) -> None:
    message = f"{what} has token id {token}: expected 0 to 9, the vocabulary of this model"
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        SamplingState(GenerationConfig(**fields), prompt, 10)
