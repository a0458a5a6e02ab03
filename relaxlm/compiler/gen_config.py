"""Writes mlc-chat-config.json and the tokenizer files of a model folder."""

from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from relaxlm.compiler import sentence_transformers
from relaxlm.compiler.closest_template import OF_FAMILY, PROBES, closest_template
from relaxlm.compiler.sentence_transformers import SentenceTransformer
from relaxlm.compiler.tokenizer_files import COPIED, collect_tokenizer_files
from relaxlm.errors import ConfigError, UnsupportedError
from relaxlm.files import read_json_object, write_atomically
from relaxlm.models import load_config, raw_config
from relaxlm.models.config import DecoderConfig, text_fields
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.chat_config import FILE_NAME, ChatConfigFile, EmbeddingSection, Pooling
from relaxlm.runtime.conv_template_table import get_conv_template
from relaxlm.runtime.conv_templates import ConvTemplate
from relaxlm.runtime.template import ChatTemplate, load_chat_templates, select_template
from relaxlm.runtime.tokenizer import Tokenizer
from relaxlm.runtime.turn_end import turn_ends

DEFAULT_PREFILL_CHUNK = 2048
DEFAULT_BATCH = 128

# Keys of config.json that say how the checkpoint was made or stored, not what it computes.
_NOT_ARCHITECTURE = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures auto_map bos_token_id dtype
    eos_token_id model_task model_type pad_token_id quantization_config torch_dtype
    transformers_version unsloth_version use_cache
    """.split()
)


def generate_config(
    source: Path,
    quantization: str,
    output: Path,
    conv_template: str | None = None,
    *,
    context_window_size: int | None = None,
    sliding_window_size: int | None = None,
    attention_sink_size: int | None = None,
    prefill_chunk_size: int | None = None,
    max_batch_size: int | None = None,
    tensor_parallel_shards: int | None = None,
    model_task: Literal["chat", "embedding"] | None = None,
    pooling: Pooling | None = None,
    normalize: bool | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write mlc-chat-config.json and the tokenizer files into `output`, which is made if need be.

    Nothing is written before everything has been read and checked; mlc-chat-config.json comes last.

    Args:
        source: a Hugging Face folder, or its config.json.
        quantization: a preset, such as "q4f16_1".
        conv_template: a named conversation template to use in place of the model's own chat
            template.
        context_window_size ..: in tokens; None for the model's own values.
        model_task: what the model is for; None for what the folder says.
        pooling, normalize: how an embedding model makes vectors; None for what the folder says.
        note: is told, in sentences, what a user may want to know of the result.

    Returns:
        The path of mlc-chat-config.json.

    Raises:
        ConfigError: config.json, generation_config.json, a preset, a template name or a size.
        UnsupportedError: an architecture or an option that relaxlm does not implement.
        TokenizerError: no tokenizer, or one that cannot be read.
        TemplateError: the model's chat template is not valid.
    """
    folder = source.parent if source.suffix == ".json" else source
    get_scheme(quantization)
    named = None if conv_template is None else get_conv_template(conv_template)
    raw, where = raw_config(folder / "config.json", model_task)
    config = load_config(folder / "config.json", model_task)
    vectors = None
    if config.model_task == "embedding":
        vectors = _vectors(folder, config, pooling, normalize, note)
    elif pooling is not None or normalize is not None:
        raise ConfigError(
            "pooling and normalize are for embedding models, and nothing says that this is one: "
            "set model_task to embedding, or leave them out"
        )
    sizes = _sizes(
        config,
        where,
        longest=None if vectors is None else vectors.longest,
        context_window_size=context_window_size,
        sliding_window_size=sliding_window_size,
        attention_sink_size=attention_sink_size,
        prefill_chunk_size=prefill_chunk_size,
        max_batch_size=max_batch_size,
        tensor_parallel_shards=tensor_parallel_shards,
        note=note,
    )

    files, settings = collect_tokenizer_files(folder, config.model_type)
    tokenizer = Tokenizer(files["tokenizer.json"], settings, str(folder / "tokenizer.json"))
    if tokenizer.vocab_size > config.vocab_size:
        note(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: the "
            "tokens beyond cannot be used"
        )

    defaults = _Defaults(folder, raw)
    eos = defaults.token_ids("eos_token_id") or _known(tokenizer.eos_id)
    if not eos and vectors is None:
        note("neither the configuration nor the tokenizer names an end-of-text token; 2 is assumed")
    section: dict[str, Any] = {
        "top_k": defaults.integer("top_k"),
        "min_p": defaults.number("min_p"),
    }
    if vectors is not None:
        conversation = (named or get_conv_template("LM")).resolve(tokenizer)
        section["embedding"] = vectors.section.model_dump(exclude_defaults=True)
    elif named is not None:
        conversation = named.resolve(tokenizer)
    else:
        templates = load_chat_templates(folder)
        conversation = _conversation(templates, folder, tokenizer, config.model_type, note)
        if templates:
            single = set(templates) == {"default"}
            section["chat_template"] = templates["default"] if single else templates
            section["special_tokens"] = tokenizer.special_tokens
    content = {
        "model_type": config.model_type,
        "quantization": quantization,
        "model_config": _architecture(raw, config, sizes),
        "vocab_size": config.vocab_size,
        "active_vocab_size": min(tokenizer.vocab_size, config.vocab_size),
        "context_window_size": sizes["context_window_size"],
        "sliding_window_size": sizes["sliding_window_size"],
        "prefill_chunk_size": sizes["prefill_chunk_size"],
        "attention_sink_size": sizes["attention_sink_size"],
        "tokenizer_files": [name for name in COPIED if name in files],
        "tokenizer_info": tokenizer.info.model_dump(),
        "conv_template": _stopping_at(conversation, {*eos, *_known(tokenizer.eos_id)}).model_dump(),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or 2,
        "relaxlm": section,
        **defaults.sampling(),
        **defaults.single_token_ids(tokenizer),
    }
    if vectors is not None:
        content["model_task"] = "embedding"
        content["embedding_metadata"] = {
            "model_type": "encoder" if config.is_encoder else "decoder",
            "pooling_strategy": vectors.pooling,
            "normalize": vectors.normalize,
        }
    chat_config = ChatConfigFile.parse(content, str(output / FILE_NAME))

    output.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomically(output / name, data)
    return chat_config.save(output)


def _vectors(
    folder: Path,
    config: DecoderConfig,
    pooling: Pooling | None,
    normalize: bool | None,
    note: Callable[[str], None],
) -> SentenceTransformer:
    """How vectors are made: as asked for, or as the folder says, or as MLC's tools would."""
    found = sentence_transformers.read(folder)
    if found is None:
        assumed: Pooling = "cls" if config.is_encoder else "last"
        if pooling is None:
            note(
                f"{folder} has no files of sentence-transformers, which say how vectors are made: "
                f"{assumed} pooling is assumed; --pooling chooses another"
            )
        found = SentenceTransformer(assumed, True, None, EmbeddingSection())
    return replace(
        found,
        pooling=pooling or found.pooling,
        normalize=found.normalize if normalize is None else normalize,
    )


# Sizes


def _sizes(
    config: DecoderConfig,
    where: str,
    *,
    longest: int | None,
    context_window_size: int | None,
    sliding_window_size: int | None,
    attention_sink_size: int | None,
    prefill_chunk_size: int | None,
    max_batch_size: int | None,
    tensor_parallel_shards: int | None,
    note: Callable[[str], None],
) -> dict[str, int]:
    if tensor_parallel_shards not in (None, 1):
        raise UnsupportedError(
            f"tensor_parallel_shards = {tensor_parallel_shards} is not supported: expected 1. "
            "relaxlm runs a model on one device."
        )
    for name, value in {
        "context_window_size": context_window_size,
        "prefill_chunk_size": prefill_chunk_size,
        "max_batch_size": max_batch_size,
    }.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} = {value}: expected a number of at least 1")
    trained = config.longest_text
    context = context_window_size or min(trained, longest or trained)
    if config.is_encoder:
        config.for_context(context)
    elif context > trained:
        note(
            f"context_window_size = {context} is more than the {trained} positions that the model "
            f"was trained for (max_position_embeddings in {where}); answers may be poor beyond them"
        )
    chunk = prefill_chunk_size or min(context, DEFAULT_PREFILL_CHUNK)
    if config.is_encoder:
        # A text fits into a step, and several short ones do.
        chunk = prefill_chunk_size or max(context, DEFAULT_PREFILL_CHUNK)
        if chunk < context:
            raise ConfigError(
                f"prefill_chunk_size = {chunk}: an encoder reads a text in one step, expected at "
                f"least context_window_size = {context}"
            )
    elif chunk > context:
        raise ConfigError(
            f"prefill_chunk_size = {prefill_chunk_size}: expected at most "
            f"context_window_size = {context}"
        )
    window, sinks = _window(config, sliding_window_size, attention_sink_size)
    config.with_window(max(window, 0), max(sinks, 0))
    return {
        "context_window_size": context,
        "sliding_window_size": window,
        "prefill_chunk_size": chunk,
        "attention_sink_size": sinks,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "max_batch_size": max_batch_size or DEFAULT_BATCH,
    }


def _window(config: DecoderConfig, window: int | None, sinks: int | None) -> tuple[int, int]:
    """The sliding window and its attention sinks, -1 for none of either."""
    if window is None:
        window = config.sliding_window or -1
    if window != -1 and window < 1:
        raise ConfigError(
            f"sliding_window_size = {window}: expected a number of at least 1, or -1 for no window"
        )
    if window == -1:
        if sinks not in (None, -1, 0):
            raise ConfigError(
                f"attention_sink_size = {sinks} needs a sliding window: set sliding_window_size too"
            )
        return -1, -1
    if sinks is None:
        return window, 0
    if not 0 <= sinks < window:
        raise ConfigError(
            f"attention_sink_size = {sinks}: expected at least 0 and less than "
            f"sliding_window_size = {window}"
        )
    return window, sinks


def _architecture(
    raw: Mapping[str, Any], config: DecoderConfig, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """The `model_config` of mlc-chat-config.json.

    config.json's own keys, in its own spelling, and those that other readers expect to be
    spelled out. null stays where a key that is not there means something else.
    """
    fields = {*type(config).model_fields, *config.absent} - {"model_type", "model_task"}
    kept = {
        key: value
        for key, value in raw.items()
        if key in fields or (key not in _NOT_ARCHITECTURE and value is not None)
    }
    spelled_out: dict[str, Any] = {
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        **({"rope_theta": config.rope.rope_theta} if config.rope is not None else {}),
    }
    rope = raw.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("rope_type", "default") != "default":
        spelled_out["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return {**kept, **spelled_out, **sizes, "disaggregation": False}


# Sampling defaults and special ids


class _Defaults:
    """generation_config.json, config.json, the part of config.json for text: the first that has a
    value gives it.
    """

    def __init__(self, folder: Path, raw: Mapping[str, Any]) -> None:
        self._sources: list[tuple[str, Mapping[str, Any]]] = []
        path = folder / "generation_config.json"
        if path.is_file():
            self._sources.append((str(path), read_json_object(path, ConfigError)))
        self._sources += [(str(folder / "config.json"), part) for part in (raw, text_fields(raw))]

    def _first(self, key: str) -> tuple[str, Any]:
        for where, content in self._sources:
            if content.get(key) is not None:
                return where, content[key]
        return "", None

    def number(self, key: str) -> float | None:
        where, value = self._first(key)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        raise ConfigError(f"{where}: {key} = {value!r}: expected a number")

    def integer(self, key: str) -> int | None:
        value = self.number(key)
        return None if value is None else int(value)

    def sampling(self) -> dict[str, float]:
        """The sampling keys that a file has. A model that samples only on request is greedy here
        too.
        """
        names = (
            "temperature",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "top_p",
        )
        found = {name: self.number(name) for name in names}
        if self._first("do_sample")[1] is False:
            found["temperature"] = 0.0
        return {name: value for name, value in found.items() if value is not None}

    def token_ids(self, key: str) -> list[int]:
        where, value = self._first(key)
        ids = value if isinstance(value, list) else _known(value)
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ConfigError(f"{where}: {key} = {value!r}: expected a token id or a list of them")
        return list(ids)

    def single_token_ids(self, tokenizer: Tokenizer) -> dict[str, int]:
        found = {}
        for key, own in (("bos_token_id", tokenizer.bos_id), ("pad_token_id", tokenizer.pad_id)):
            ids = self.token_ids(key) or _known(own)
            if ids:
                found[key] = ids[0]
        return found


def _known(value: Any) -> list[Any]:
    return [] if value is None else [value]


# Templates


def _conversation(
    templates: Mapping[str, str],
    folder: Path,
    tokenizer: Tokenizer,
    model_type: str,
    note: Callable[[str], None],
) -> ConvTemplate:
    """The conv_template that stands beside the model's chat template, or in its place."""
    compiled = {
        name: ChatTemplate(source, f"{folder}: chat template {name!r}")
        for name, source in templates.items()
    }
    if not compiled:
        names = OF_FAMILY.get(model_type)
        note(
            "the model has no chat template, so messages are continued as plain text (LM). If it "
            "is a chat model, name its format with --conv-template"
            + (f"; of {model_type} there are {', '.join(names)}" if names else "")
        )
        return get_conv_template("LM").resolve(tokenizer)
    template = compiled[select_template(compiled)]
    closest = closest_template(template, tokenizer, model_type)
    note(
        f"prompts are written by the model's own chat template; conv_template, for other tools, is "
        f"{closest.template.name}, which writes {closest.alike} of {len(PROBES)} test "
        "conversations "
        "alike"
    )
    return _stopping_at(closest.template, turn_ends(template, tokenizer, tokenizer.special_tokens))


def _stopping_at(template: ConvTemplate, eos: Set[int]) -> ConvTemplate:
    """The template with further tokens that end an answer: other tools stop at no others."""
    ids = [*template.stop_token_ids, *sorted(eos - {*template.stop_token_ids})]
    return template.model_copy(update={"stop_token_ids": ids})
