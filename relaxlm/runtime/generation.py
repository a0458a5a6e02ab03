"""What a caller may ask of a generation, and what is remembered about it from token to token."""

import difflib
from array import array
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from relaxlm.errors import RequestError

_EXPECTED = {
    "temperature": "a number, 0 (greedy) or more",
    "top_p": "a number from 0 to 1",
    "top_k": "a whole number, 1 or more, or 0 for all tokens",
    "min_p": "a number from 0 to 1",
    "repetition_penalty": "a number from 0.01 to 100",
    "presence_penalty": "a number from -2 to 2",
    "frequency_penalty": "a number from -2 to 2",
    "max_tokens": "a whole number, 1 or more",
    "stop": "a string or a list of strings, none of them empty",
    "stop_token_ids": "a list of token ids, whole numbers from 0 to 2**31 - 1",
    "seed": "a whole number from -2**63 to 2**64 - 1",
    "logit_bias": "token ids (0 to 2**31 - 1), each with a number from -100 to 100",
    "n": "a whole number from 1 to 128",
    "ignore_eos": "true or false",
    "logprobs": "true or false",
    "top_logprobs": "a whole number from 0 to 20",
}

Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class GenerationConfig(BaseModel):
    """How to choose tokens and when to end.

    A field that is not given, or given as None, is unset: it reads as the default below, and
    `merged` fills it from other defaults. `max_gen_len` is another name for `max_tokens`.

    Raises:
        RequestError: an unknown field, or a value outside its range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    temperature: Annotated[float, Field(ge=0)] = 1.0  # 0: always the most probable token
    top_p: Probability = 1.0  # 1: off
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: off; -1 is read as 0
    min_p: Probability = 0.0  # 0: off
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0  # 1: off
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    max_tokens: Annotated[int, Field(ge=1)] | None = None  # None: as many as the context takes
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    stop_token_ids: tuple[TokenId, ...] = ()
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None  # None: a new one each time
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = {}
    n: Annotated[int, Field(ge=1, le=128)] = 1
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    def __init__(self, **fields: Any) -> None:
        given = {name: value for name, value in fields.items() if value is not None}
        spelling = {name: name for name in given}
        if "max_gen_len" in given:
            value = given.pop("max_gen_len")
            if given.setdefault("max_tokens", value) != value:
                raise RequestError(
                    f"max_tokens = {given['max_tokens']!r} and max_gen_len = {value!r} are two "
                    "names of one limit: give one of them"
                )
            spelling.setdefault("max_tokens", "max_gen_len")
        for name in given:
            if name not in _EXPECTED:
                raise RequestError(_unknown(name))
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise RequestError(_explain(error, spelling)) from None

    @property
    def max_gen_len(self) -> int | None:
        return self.max_tokens

    def merged(self, defaults: "GenerationConfig | Mapping[str, Any]") -> "GenerationConfig":
        """This configuration, with unset fields taken from `defaults` where they are set there.

        A field falls through as a whole: `stop` given here replaces the default's.
        """
        if not isinstance(defaults, GenerationConfig):
            defaults = GenerationConfig(**defaults)
        fields = {name: getattr(defaults, name) for name in defaults.model_fields_set}
        fields |= {name: getattr(self, name) for name in self.model_fields_set}
        return GenerationConfig(**fields)

    @field_validator("top_k", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return 0 if isinstance(value, int) and value == -1 else value

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else _tuple(value)

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _many(cls, value: Any) -> Any:
        return _tuple(value)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _json_keys(cls, value: Any) -> Any:
        """JSON objects have strings for keys."""
        if not isinstance(value, Mapping):
            return value
        return {int(k) if isinstance(k, str) and k.isdecimal() else k: v for k, v in value.items()}

    @model_validator(mode="after")
    def _asked_for(self) -> "GenerationConfig":
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs = {self.top_logprobs} needs logprobs = true")
        return self


class SamplingState:
    """One reply in the making: its settings, its random numbers, and the tokens so far.

    Args:
        config: with its defaults merged in.
        prompt: token ids that the repetition penalty counts as seen.
        vocab_size: ids are below it. If the model's logits are padded, the number of real ones.
        choice: which of the config's `n` replies; each has random numbers of its own.

    Attributes:
        mask: [ceil(vocab_size / 32)] uint32, or None: the next token i is allowed if bit i % 32 of
            word i // 32 is 1. Whoever sets it sets it anew for each token.
        adjusts: whether a bias or a penalty changes logits.
        greedy: whether the model's largest logit wins, among those that are allowed.

    Raises:
        RequestError: a token id outside the vocabulary.
    """

    def __init__(
        self,
        config: GenerationConfig,
        prompt: Sequence[int] | np.ndarray,
        vocab_size: int,
        choice: int = 0,
    ) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.adjusts = (
            len(config.logit_bias) > 0
            or config.repetition_penalty != 1
            or config.presence_penalty != 0
            or config.frequency_penalty != 0
        )
        self.greedy = config.temperature == 0 and not self.adjusts
        self.mask: np.ndarray | None = None
        prompt_ids = np.unique(np.asarray(prompt, np.int64))
        self.bias_ids = np.array(list(config.logit_bias.keys()), np.int64)
        self.bias = np.array(list(config.logit_bias.values()), np.float64)
        for name, ids in (
            ("the prompt", prompt_ids),
            ("logit_bias", self.bias_ids),
            ("stop_token_ids", np.array(config.stop_token_ids, np.int64)),
        ):
            outside = ids[(ids < 0) | (ids >= vocab_size)]
            if len(outside):
                raise RequestError(
                    f"{name} has token id {outside[0]}: expected 0 to {vocab_size - 1}, "
                    "the vocabulary of this model"
                )
        seed = None if config.seed is None else [config.seed % 2**64, choice]
        self._random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
        self._seen = array("q", prompt_ids.tobytes())  # distinct ids: the prompt's, then new ones
        self._in_prompt = frozenset(prompt_ids.tolist())
        self._place: dict[int, int] = {}  # generated id -> its place in the next two
        self._ids = array("q")
        self._counts = array("q")

    @property
    def generated(self) -> int:
        """Tokens accepted so far."""
        return sum(self._counts)

    def accept(self, token: int) -> None:
        """Count a token of the reply; `sample` does it for those that it chooses."""
        place = self._place.get(token)
        if place is not None:
            self._counts[place] += 1
            return
        self._place[token] = len(self._ids)
        self._ids.append(token)
        self._counts.append(1)
        if token not in self._in_prompt:
            self._seen.append(token)

    def uniform(self) -> float:
        """The next random number, in [0, 1)."""
        return self._random.random()

    def seen(self) -> np.ndarray:
        """[k] int64: the distinct token ids of prompt and reply."""
        return np.array(self._seen)

    def generated_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """[k] int64 distinct token ids of the reply, [k] int64 how often each."""
        return np.array(self._ids), np.array(self._counts)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _unknown(name: str) -> str:
    known = [*_EXPECTED, "max_gen_len"]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"
    return f"{name!r} is not a generation option: {hint}"


def _explain(error: ValidationError, spelling: dict[str, str]) -> str:
    """One sentence per field: name, value as given, what was expected."""
    problems: dict[str, str] = {}
    for item in error.errors(include_url=False):
        if not item["loc"]:  # from _asked_for
            problems[""] = str(item["ctx"]["error"])
            continue
        field, *inner = item["loc"]
        inner = [key for key in inner if key != "[key]"]
        name = spelling[str(field)] + "".join(f"[{key!r}]" for key in inner)
        text = f"{name} = {item['input']!r} is not possible: expected {_EXPECTED[str(field)]}"
        problems.setdefault(str(field), text)
    return "; ".join(problems.values())
