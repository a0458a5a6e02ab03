"""Reading config.json: what decides what a decoder computes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from relaxlm.errors import ConfigError, UnsupportedError
from relaxlm.models.rope import ROPE_LENGTHS, ROPE_TYPES, Rope

# Fields of config.json that say nothing about what the compiled model computes: training settings,
# bookkeeping of the library that wrote the file, and ids that gen_config reads by itself.
WITHOUT_EFFECT = frozenset(
    """
    _name_or_path apply_query_key_layer_scaling architectures attention_dropout attention_sink_size
    attention_softmax_in_fp32 attn_implementation attn_pdrop auto_map bias_dropout_fusion
    boi_token_index bos_token_id cache_implementation chunk_size_feed_forward classifier_dropout
    context_window_size disaggregation dtype embd_pdrop embedding_dropout eoi_token_index
    eos_token_id finetuning_task fp32_residual_connection gradient_checkpointing hidden_dropout
    id2label image_token_index initializer_range interleaved_qkv is_decoder is_encoder_decoder
    kv_cache_dtype label2id layer_types max_batch_size max_sequence_length max_window_layers
    mm_tokens_per_image model_max_length model_type n_ctx original_max_position_embeddings
    original_rope output_attentions output_hidden_states output_scores pad_token_id
    partial_rotary_factor pipeline_parallel_stages prefill_chunk_size prefix_projection
    pretraining_tp problem_type quantization_config reorder_and_upcast_attn resid_pdrop
    residual_dropout return_dict rope_parameters rope_scaling rope_theta
    scale_attention_softmax_in_fp32 sliding_window sliding_window_size summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj task_specific_params
    tensor_parallel_shards tokenizer_class torch_dtype torchscript transformers.js_config
    transformers_version unk_token_id unsloth_fixed unsloth_version use_cache use_sliding_window
    z_loss_weight
    """.split()
)


@dataclass(frozen=True)
class StateTensor:
    """One tensor of what a recurrent layer keeps of a sequence: [slots, *shape] of `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


# What `layers.ACTIVATIONS` computes.
Activation = Literal[
    "silu",
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_tanh",
    "gelu_pytorch_tanh",
    "relu",
    "relu2",
]


class DecoderConfig(BaseModel):
    """The configuration fields that decide what a decoder computes.

    Values come from config.json. Old files leave some fields out; `absent` holds, per
    architecture, what transformers' own configuration class fills in for those (a test compares
    the two), and nothing else has a default. `sliding_window` and `attention_sinks` are in tokens.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    # What transformers fills in for a field that config.json leaves out.
    absent: ClassVar[Mapping[str, Any]] = {}
    # Names in the family's config.json -> names here, where they differ.
    spelling: ClassVar[Mapping[str, str]] = {"rms_norm_eps": "norm_eps"}
    # Fields of the family's config.json, besides WITHOUT_EFFECT, that its reference does not read
    # when it computes.
    without_effect: ClassVar[frozenset[str]] = frozenset()

    model_type: str
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    hidden_act: Activation
    norm_eps: float = Field(ge=0)
    max_position_embeddings: PositiveInt
    rope: Rope
    tie_word_embeddings: bool
    # One window per layer, 0 for full attention; `read` fills it in from the family's spelling.
    windows: tuple[int, ...]
    attention_sinks: int = Field(ge=0)
    # What the model is for; "embedding" needs no logits.
    model_task: Literal["chat", "embedding"] = "chat"

    # Whether every token attends to all of its text, in one step and without a cache.
    is_encoder: ClassVar[bool] = False
    # Whether rotary embeddings pair features 2 i and 2 i + 1.
    rope_in_pairs: ClassVar[bool] = False

    @model_validator(mode="after")
    def _shapes_fit(self) -> "DecoderConfig":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd, rotary embeddings need pairs")
        return self

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> "DecoderConfig":
        """Check one configuration.

        Args:
            raw: the contents of config.json, or `model_config` of mlc-chat-config.json.
            where: the file's name, for messages.

        Raises:
            UnsupportedError: a value that relaxlm does not implement.
            ConfigError: a missing or malformed value.
        """
        values = {**cls.absent, **{key: value for key, value in raw.items() if value is not None}}
        for theirs, ours in cls.spelling.items():
            if theirs in values:
                values.setdefault(ours, values[theirs])
        heads, layers = values.get("num_attention_heads"), values.get("num_hidden_layers")
        if isinstance(heads, int) and heads > 0:
            if "num_key_value_heads" in raw and raw["num_key_value_heads"] is None:
                values["num_key_value_heads"] = heads
            values.setdefault("num_key_value_heads", heads)
            if isinstance(values.get("hidden_size"), int):
                values.setdefault("head_dim", values["hidden_size"] // heads)
        values["rope"] = cls._rope(values)
        if isinstance(layers, int) and layers > 0:
            values["windows"] = cls._windows(values, layers, where)
        values.setdefault("attention_sinks", max(0, values.get("attention_sink_size", 0)))
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            names = {ours: theirs for theirs, ours in cls.spelling.items()}
            raise _explain(error, where, names) from None

    @classmethod
    def _rope(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Unite the old spelling (rope_theta, rope_scaling) and the new one (rope_parameters)."""
        return rope_fields(values, values.get("rope_parameters") or values.get("rope_scaling"))

    @classmethod
    def _windows(cls, values: Mapping[str, Any], layers: int, where: str) -> tuple[int, ...]:
        """The window of each layer: the run-time override first, then the family's own fields."""
        override = values.get("sliding_window_size", -1)
        if override > 0:
            return (override,) * layers
        window = values.get("sliding_window") or 0
        kinds = values.get("layer_types")
        if kinds is None:
            kinds = cls.default_layer_types(values, layers)
        unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if unknown or len(kinds) != layers:
            raise UnsupportedError(
                f"{where}: layer_types has {len(kinds)} entries"
                + (f", among them {', '.join(map(repr, unknown))}" if unknown else "")
                + f"; expected {layers}, each 'full_attention' or 'sliding_attention'"
            )
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)

    @classmethod
    def default_layer_types(cls, values: Mapping[str, Any], layers: int) -> list[str]:
        """The kind of each layer where config.json has no `layer_types`."""
        return ["full_attention"] * layers

    def layer_rope(self, layer: int) -> Any:
        """The rotary embedding of a layer; None if it has none."""
        return self.rope

    def for_context(self, context: int) -> "DecoderConfig":
        """The same model with rotary embeddings for texts of up to `context` tokens."""
        return self.model_copy(update={"rope": self.rope.for_context(context)})

    @property
    def has_head(self) -> bool:
        """Whether a library of the model computes logits."""
        return self.model_task == "chat"

    @property
    def longest_text(self) -> int:
        """Tokens of the longest text that the model was trained for."""
        return self.max_position_embeddings

    @property
    def attention_scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        return self.head_dim**-0.5

    @property
    def alibi_slopes(self) -> tuple[float, ...] | None:
        """What every query head's scores lose for each token between key and query (ALiBi), None
        if nothing: see `models/alibi.py`."""
        return None

    @property
    def chunked_attention(self) -> bool:
        """Whether windows are chunks: a token sees those of the same chunk, of so many tokens."""
        return False

    @property
    def latent_cache(self) -> tuple[int, int] | None:
        """Features of the latent and of the rotated key that layers cache instead of heads."""
        return None

    def layer_states(self, layer: int) -> tuple[StateTensor, ...]:
        """What a layer keeps of a sequence beside the paged cache (`models/state.py`)."""
        return ()

    def has_pages(self, layer: int) -> bool:
        """Whether a layer attends, and so has pages in the cache."""
        return True

    @property
    def embedding_scale(self) -> float:
        """What the vectors of the embedding are multiplied by."""
        return 1.0

    @property
    def residual_scale(self) -> float:
        """What attention and MLP are multiplied by where they join the residual stream."""
        return 1.0

    @property
    def logits_scale(self) -> float:
        """What logits are multiplied by."""
        return 1.0

    @property
    def sliding_window(self) -> int:
        """Tokens after which a key is never read again; 0 if some layer reads all of them."""
        return 0 if 0 in self.windows else max(self.windows)

    def with_window(self, window: int, sinks: int) -> "DecoderConfig":
        """The same model with every layer limited to `window` tokens plus the first `sinks`."""
        return self.model_copy(
            update={
                "windows": (window,) * self.num_hidden_layers if window > 0 else self.windows,
                "attention_sinks": sinks,
            }
        )


def unknown_fields(config: DecoderConfig, raw: Mapping[str, Any]) -> list[str]:
    """Fields of config.json that relaxlm neither uses nor knows to be without effect."""
    raw = text_fields(raw)
    known = WITHOUT_EFFECT | set(type(config).model_fields) | set(config.absent)
    known |= set(config.spelling) | config.without_effect
    return sorted(key for key, value in raw.items() if key not in known and value)


def text_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model that reads text only: its own, or that within the one of more."""
    nested = raw.get("text_config")
    if not isinstance(nested, Mapping):
        return dict(raw)
    parts = ("text_config", "vision_config", "audio_config")
    outer = {key: value for key, value in raw.items() if key not in parts}
    return {**outer, **nested, "model_type": raw.get("model_type")}


def rope_fields(values: Mapping[str, Any], scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields of a rotary embedding.

    Args:
        values: config.json, which has some of them outside of `scaling`.
        scaling: rope_parameters or rope_scaling, if there is one.
    """
    rope = {key: value for key, value in (scaling or {}).items() if value is not None}
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    kind = rope.setdefault("rope_type", "default")
    if kind in _RENAMED_ROPES:
        kind = rope["rope_type"] = _RENAMED_ROPES[kind]
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in values:
            rope.setdefault(name, values[name])
    for name in ROPE_LENGTHS.get(kind, ()):
        # The trained length is where the family puts it, or the length that there is.
        for place in (name, "max_position_embeddings"):
            if place in values:
                rope.setdefault(name, values[place])
    return rope


# Names that transformers has given up.
_RENAMED_ROPES = {"su": "longrope", "dynamic_ntk": "dynamic"}


def _explain(error: ValidationError, where: str, names: Mapping[str, str]) -> ConfigError:
    """The first problem pydantic found, in words, and in config.json's own names."""
    problem = error.errors(include_url=False)[0]
    path = [str(part) for part in problem["loc"] if part not in ROPE_TYPES]
    place = ".".join([names.get(path[0], path[0]), *path[1:]]) if path else ""
    if problem["type"] in ("literal_error", "union_tag_invalid"):
        if problem["type"] == "union_tag_invalid":
            place, found = "rope_parameters.rope_type", problem["ctx"]["tag"]
            expected = f"Input should be {problem['ctx']['expected_tags']}"
        else:
            found, expected = problem["input"], problem["msg"]
        return UnsupportedError(f"{where}: {place} = {found!r} is not supported: {expected}")
    if problem["type"] == "missing":
        return ConfigError(
            f"{where}: {place} is missing. Is this the config.json of the model itself?"
        )
    found = "" if place == "" else f"{place} = {problem['input']!r}: "
    return ConfigError(f"{where}: {found}{problem['msg']}")
