"""The base of all request types: what a field may hold, and how a wrong one is refused.

A field is honoured, or refused with an error that names it. `refused` lists the fields of OpenAI's
API that ask for something that is not there, each with what to do instead; `without_effect` those
that are accepted because they change nothing of an answer. null stands for a field not given.
"""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import Self

from relaxlm.openai_api.errors import ApiError

# The longest value that an error message repeats, in characters.
_SHOWN = 60

MAX_STOPS = 64

Count = Annotated[int, Field(ge=1, lt=2**31)]
Stop = Annotated[str, Field(min_length=1)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)]
LogitBias = dict[
    Annotated[str, Field(pattern="^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]
]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class RequestModel(BaseModel):
    """Part of a request. Attributes are None where the client gave nothing."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    refused: ClassVar[Mapping[str, str]] = {}
    without_effect: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def parse(cls, data: Any) -> Self:
        """A request from parsed JSON.

        Raises:
            ApiError: names the field that is wrong, unknown or not supported.
        """
        try:
            _check_text(data, "")
            return cls.model_validate(data)
        except ValidationError as error:
            raise _explained(error, data) from None
        except RecursionError:
            raise ApiError("the request is nested too deeply: send fewer levels") from None

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        kept = {}
        for name, value in data.items():
            if name in known:
                kept[name] = value
            elif name in cls.refused:
                if value is not None:
                    raise _wrong(f"is not supported: {cls.refused[name]}", name)
            else:
                raise _wrong(f"is not a field of this request: {_hint(name, known)}", name)
        return kept

    def given(self, *names: str) -> dict[str, Any]:
        """Those of these fields that the client gave."""
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


def plain(value: Any) -> Any:
    """A value from Python as JSON would have it: replies become objects, tuples lists."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump(by_alias=True, exclude_none=True))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def wrong_value(message: str, name: str) -> PydanticCustomError:
    """For validators of requests: `name` is the field below the object that is validated."""
    return _wrong(message, name)


def shown(value: object) -> str:
    """A value as errors repeat it."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _check_text(value: Any, where: str) -> None:
    """JSON can spell halves of surrogate pairs, which no text has and no reply can repeat."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ApiError(
                f"{where or 'the request'} has {value[error.start]!a} at position {error.start}, "
                "half of a surrogate pair and no character: send valid Unicode",
                param=where or None,
            ) from None
    elif isinstance(value, Mapping):
        for name, item in value.items():
            _check_text(name, where)
            _check_text(item, f"{where}.{name}" if where else str(name))
    elif isinstance(value, list) and value and not isinstance(value[0], int):
        for i, item in enumerate(value):
            _check_text(item, f"{where}[{i}]")


def _wrong(message: str, name: str) -> PydanticCustomError:
    # Braces in a message would be read as places for the context's values.
    return PydanticCustomError("field", "{problem}", {"problem": message, "name": str(name)})


def _hint(name: object, known: set[str]) -> str:
    close = difflib.get_close_matches(str(name)[:_SHOWN], known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"expected one of {', '.join(sorted(known))}"


def _explained(error: ValidationError, data: Any) -> ApiError:
    """The first thing that is wrong, as far as possible in the client's own terms."""
    found: dict[str, tuple[Any, list[str]]] = {}
    for item in error.errors(include_url=False):
        where, value = _place(item, data)
        name = item.get("ctx", {}).get("name")
        if item["type"] == "field" and name is not None:
            where = f"{where}.{name}" if where else name
            return ApiError(f"{where[:200]} {item['ctx']['problem']}", param=where[:200])
        found.setdefault(where, (value, []))[1].append(_problem(item))
    # Of a union's members, the one that fits best fails deepest.
    where = max(found, key=lambda place: place.count(".") + place.count("["))
    value, problems = found[where]
    problems = list(dict.fromkeys(problems))
    if problems == ["missing"]:
        return ApiError(f"{where} is missing: it is required", param=where)
    text = f"{where or 'the request'} = {shown(value)} is not possible: {' or '.join(problems)}"
    return ApiError(text, param=where or None)


def _problem(item: ErrorDetails) -> str:
    if item["type"] == "missing":
        return "missing"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    return message[:1].lower() + message[1:]


def _place(item: ErrorDetails, data: Any) -> tuple[str, Any]:
    """Where in the client's JSON an error is, such as "messages[0].content", and what is there.

    pydantic's locations also have the names of a union's members, which the data do not have.
    """
    where, value = "", data
    for i, part in enumerate(item["loc"]):
        last = i == len(item["loc"]) - 1
        if isinstance(value, Mapping) and part in value:
            where, value = f"{where}.{part}" if where else str(part), value[part]
        elif isinstance(value, list) and isinstance(part, int) and 0 <= part < len(value):
            where, value = f"{where}[{part}]", value[part]
        elif last and item["type"] == "missing":
            where, value = f"{where}.{part}" if where else str(part), None
    return where, value
