"""mlc-chat-config.json: what a converted model folder says of the model and of chatting with it.

The keys are those of the MLC ecosystem, so that folders can be exchanged with its tools. What only
relaxlm knows is under the key "relaxlm", which the others ignore: the model's own chat template
(Jinja) and special tokens, and sampling defaults that the format has no key for. Where a folder
has both a chat template and a `conv_template`, relaxlm uses the chat template; `conv_template`
is then the closest named one, for the other tools.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from relaxlm.errors import ConfigError
from relaxlm.files import json_bytes, read_json_object, write_atomically
from relaxlm.runtime.conv_template_table import get_conv_template
from relaxlm.runtime.conv_templates import ConvTemplate
from relaxlm.runtime.template import named_templates
from relaxlm.runtime.tokenizer import Tokenizer, TokenizerInfo

FILE_NAME = "mlc-chat-config.json"
VERSION = "0.1.0"

# Keys of earlier MLC releases. They are read, kept in `legacy`, and not written again.
LEGACY_KEYS = {
    "mean_gen_len": "the expected length of an answer; unused since 2024",
    "max_gen_len": "the limit of an answer's length",
    "shift_fill_factor": "how much of a full context was kept",
    "local_id": "the name of the model",
    "model_name": "the name of the model",
    "model_lib": "the library's name",
    "model_lib_path": "the library's path",
    "model_lib_url": "the library's address",
    "model_category": "now model_type",
    "num_shards": "now tensor_parallel_shards",
    "use_presharded_weights": "weights split before loading",
    "max_window_size": "now context_window_size",
    "max_sequence_length": "now context_window_size",
    "max_batch_size": "now in model_config",
    "sliding_window": "now sliding_window_size",
    "sliding_window_chunk_size": "now prefill_chunk_size",
    "token_table_postproc_method": "now in tokenizer_info",
    "conv_config": "keys of conv_template that replace the template's own",
    "disaggregation": "now in model_config",
}
_RENAMED = {
    "model_category": "model_type",
    "num_shards": "tensor_parallel_shards",
    "max_sequence_length": "context_window_size",
    "max_window_size": "context_window_size",
    "sliding_window": "sliding_window_size",
    "sliding_window_chunk_size": "prefill_chunk_size",
}


Pooling = Literal["cls", "mean", "last", "max"]


class EmbeddingMetadata(BaseModel):
    """The key "embedding_metadata": how the states of a text become its vector.

    `pooling_strategy`: the state of the first token, their mean, the state of the last token, or
    the largest number of each feature. `normalize`: whether vectors have length 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_type: Literal["encoder", "decoder"]
    pooling_strategy: Pooling
    normalize: bool = True


class EmbeddingSection(BaseModel):
    """What else sentence-transformers keeps of an embedding model.

    `prompts`: what is put in front of texts, by what they are for ("query"); the one named
    `default_prompt_name` wherever nothing else is asked for. `lowercase`: whether texts are.
    `strip`: whether spaces at both ends of a text, its prompt included, are left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: dict[str, str] = Field(default_factory=dict)
    default_prompt_name: str | None = None
    lowercase: bool = False
    strip: bool = False


class RelaxLMSection(BaseModel):
    """The key "relaxlm": what the ecosystem's format has no place for.

    `chat_template` is one Jinja template, or several by name ("default", "tool_use").
    `special_tokens` are the tokens by role ("bos_token") that the template may name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    chat_template: str | dict[str, str] | None = None
    special_tokens: dict[str, str] = Field(default_factory=dict)
    top_k: int | None = None
    min_p: float | None = None
    embedding: EmbeddingSection = EmbeddingSection()


class ChatConfigFile(BaseModel):
    """The content of mlc-chat-config.json. Sizes are in tokens; -1 means none.

    `architecture` is the key "model_config": the architecture's keys of config.json, and the
    sizes that the library was configured for. `conv_template` may be a name in older folders;
    `conversation` gives the template itself. `legacy` has the keys of earlier releases that the
    file had.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=()
    )

    version: str = VERSION
    model_type: str
    quantization: str
    architecture: dict[str, Any] = Field(alias="model_config")
    vocab_size: int = Field(gt=0)
    context_window_size: int
    sliding_window_size: int = -1
    prefill_chunk_size: int = Field(gt=0)
    attention_sink_size: int = -1
    tensor_parallel_shards: int = 1
    pipeline_parallel_stages: int = 1
    active_vocab_size: int = Field(gt=0)
    temperature: float = Field(default=1.0, ge=0)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, ge=0, le=1)
    tokenizer_files: list[str] = Field(default_factory=list)
    tokenizer_info: TokenizerInfo = TokenizerInfo()
    conv_template: ConvTemplate | str | None = None
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int | list[int] = 2
    model_task: Literal["chat", "embedding"] = "chat"
    embedding_metadata: EmbeddingMetadata | None = None
    relaxlm: RelaxLMSection = RelaxLMSection()

    _legacy: dict[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> "ChatConfigFile":
        """Read the file of a model folder, or the file itself.

        Raises:
            ConfigError: there is none, it is not JSON, a key is unknown or missing, or a value does
                not fit its key.
        """
        path = Path(folder)
        if path.is_dir() or path.suffix != ".json":
            path = path / FILE_NAME
        if not path.is_file():
            raise ConfigError(
                f"{path}: no such file. `relaxlm gen_config` writes it into a converted "
                f"model's folder."
            )
        return cls.parse(read_json_object(path, ConfigError), str(path))

    @classmethod
    def parse(cls, content: Mapping[str, Any], where: str = FILE_NAME) -> "ChatConfigFile":
        """Check the content of the file, of this or an earlier release. Raises as `load` does."""
        legacy = {key: value for key, value in content.items() if key in LEGACY_KEYS}
        current = {key: value for key, value in content.items() if key not in LEGACY_KEYS}
        # null is how the field's tools write a value that was never set.
        current = {key: value for key, value in current.items() if value is not None}
        for old, new in _RENAMED.items():
            if old in legacy:
                current.setdefault(new, legacy[old])
        _fill_in(current, legacy)
        try:
            config = cls.model_validate(current)
        except ValidationError as reason:
            raise ConfigError(f"{where}: {explained(reason)}") from reason
        if isinstance(config.conv_template, str):
            get_conv_template(config.conv_template)
        config._legacy.update(legacy)
        return config

    def save(self, folder: str | Path) -> Path:
        """Write the file into a folder, at once or not at all; returns its path."""
        path = Path(folder) / FILE_NAME
        write_atomically(path, json_bytes(self.as_json()))
        return path

    def as_json(self) -> dict[str, Any]:
        """The content of the file."""
        content = self.model_dump(mode="json", by_alias=True)
        section = self.relaxlm.model_dump(mode="json", exclude_defaults=True)
        del content["relaxlm"]
        return content | ({"relaxlm": section} if section else {})

    @property
    def legacy(self) -> dict[str, Any]:
        """The keys of earlier releases that the file had, with their values."""
        return dict(self._legacy)

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end a text, as a list."""
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else self.eos_token_id

    def embedding(self, is_encoder: bool) -> EmbeddingMetadata:
        """How vectors are made: as the file says, or else as MLC's tools do.

        An encoder's vector is the state of its first token, a decoder's that of the last one.
        """
        if self.embedding_metadata is not None:
            return self.embedding_metadata
        if is_encoder:
            return EmbeddingMetadata(model_type="encoder", pooling_strategy="cls")
        return EmbeddingMetadata(model_type="decoder", pooling_strategy="last")

    @property
    def chat_templates(self) -> dict[str, str]:
        """The model's own chat templates by name; empty if only `conv_template` is there."""
        template = self.relaxlm.chat_template
        return named_templates(template, FILE_NAME) if template else {}

    def conversation(self, tokenizer: Tokenizer) -> ConvTemplate | None:
        """`conv_template` with its name looked up and the `conv_config` of old files applied.

        Raises:
            ConfigError: `conv_config` has a key or value that does not fit.
        """
        template = self.conv_template
        if isinstance(template, str):
            template = get_conv_template(template).resolve(tokenizer)
        changes = self._legacy.get("conv_config")
        if template is None or not changes:
            return template
        try:
            return ConvTemplate.model_validate(template.model_dump() | changes)
        except ValidationError as reason:
            raise ConfigError(f"{FILE_NAME}: conv_config: {explained(reason)}") from reason


def _fill_in(current: dict[str, Any], legacy: Mapping[str, Any]) -> None:
    """Keys that older files lack, from where they stood before."""
    architecture = current.get("model_config")
    if isinstance(architecture, dict):
        for key in ("vocab_size", "context_window_size", "prefill_chunk_size"):
            if isinstance(architecture.get(key), int):
                current.setdefault(key, architecture[key])
    if isinstance(current.get("context_window_size"), int):
        current.setdefault("prefill_chunk_size", current["context_window_size"])
    if "vocab_size" in current:
        current.setdefault("active_vocab_size", current["vocab_size"])
    if "token_table_postproc_method" in legacy:
        method = legacy["token_table_postproc_method"]
        current.setdefault("tokenizer_info", {"token_postproc_method": method})


def explained(reason: ValidationError) -> str:
    """What pydantic found wrong, one clause per key: unknown, missing, or a value as read."""
    unknown: list[str] = []
    missing: list[str] = []
    wrong: dict[str, str] = {}
    for error in reason.errors(include_url=False):
        # Members of a union appear in the location under their type's name.
        parts = [str(part) for part in error["loc"] if part not in ("ConvTemplate", "str", "int")]
        parts = [part for part in parts if not part.startswith(("list[", "dict["))]
        key = ".".join(parts)
        if error["type"] == "extra_forbidden":
            unknown.append(key)
        elif error["type"] == "missing":
            missing.append(key)
        else:
            wrong.setdefault(key, f"{key} = {_shortened(error['input'])}: {error['msg']}")
    clauses = []
    if missing:
        clauses.append(f"missing: {', '.join(missing)}")
    if unknown:
        clauses.append(f"unknown: {', '.join(unknown)}")
    # A union reports the failure of every member; the innermost key says most.
    clauses += [
        text
        for key, text in wrong.items()
        if not any(other.startswith(f"{key}.") for other in [*wrong, *unknown, *missing])
    ]
    return "; ".join(clauses)


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
