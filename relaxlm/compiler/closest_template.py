# ruff: noqa: RUF001 (a token of DeepSeek is spelled with a full-width bar)
"""Finds the named conversation template that comes closest to a model's own chat template.

relaxlm renders the chat template itself. Other tools that read the folder know only
`conv_template`; they get the named template that writes most of a few conversations alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from relaxlm.errors import TemplateError
from relaxlm.runtime.conv_template_table import CONV_TEMPLATES
from relaxlm.runtime.conv_templates import ConvTemplate
from relaxlm.runtime.named_template import NamedTemplate
from relaxlm.runtime.template import ChatTemplate
from relaxlm.runtime.tokenizer import Tokenizer

_SYSTEM = {"role": "system", "content": "Answer in one word."}
_USER = {"role": "user", "content": "What is red?"}
_REPLY = {"role": "assistant", "content": "Blood."}
_AGAIN = {"role": "user", "content": "And\nblue?"}
PROBES: tuple[list[dict[str, Any]], ...] = (
    [_USER],
    [_SYSTEM, _USER, _REPLY, _AGAIN],
    [_USER, _REPLY, _AGAIN],
)

# For a template that no name fits: a token that gives the family away.
_FAMILIES = {
    "<|start_header_id|>": "llama-3_1",
    "<|header_start|>": "llama-4",
    "<|channel|>": "gpt-oss",
    "<|start_of_role|>": "granite",
    "<|im_middle|>": "kimi_k2",
    "<|im_sep|>": "phi-4-14b",
    "]~b]": "minimax_m2",
    "<SPECIAL_12>": "nemotron_nano_v2",
    "<|userprompt|>": "dots1",
    "<|START_OF_TURN_TOKEN|>": "command-r",
    "<｜User｜>": "deepseek_v3",
    "<sop>": "glm-4",
    "<|im_start|>": "chatml",
    "<start_of_turn>": "gemma_instruction",
    "[SYSTEM_PROMPT]": "ministral3",
    "[INST]": "mistral_default",
    "<|end|>": "phi-3",
}
# model_type -> the templates of the models that are published under it, the newest last. Types that
# are not here have no chat models of a format of their own, or theirs has no name.
OF_FAMILY: Mapping[str, tuple[str, ...]] = {
    "baichuan": ("baichuan", "baichuan2"),
    "chatglm": ("chatglm3", "glm-4"),
    "cohere": ("command-r", "aya-23"),
    "deepseek_v2": ("deepseek_v2",),
    "deepseek_v3": ("deepseek_v3",),
    "dots1": ("dots1",),
    "ernie4_5": ("ernie-4.5",),
    "ernie4_5_moe": ("ernie-4.5",),
    "gemma": ("gemma_instruction",),
    "gemma2": ("gemma_instruction",),
    "gemma3": ("gemma3_instruction",),
    "gemma3_text": ("gemma3_instruction",),
    "glm": ("glm-4",),
    "glm4": ("glm-4",),
    "glm4_moe": ("glm-4.5",),
    "gpt_neox": ("dolly", "oasst", "redpajama_chat", "stablelm"),
    "gpt_oss": ("gpt-oss",),
    "granite": ("granite",),
    "granitemoe": ("granite",),
    "granitemoehybrid": ("granite",),
    "internlm2": ("internlm2",),
    "kimi_k2": ("kimi_k2",),
    "lfm2": ("lfm2",),
    "llama": ("llama-2", "llama-3", "llama-3_1", "vicuna_v1.1", "tinyllama_v1_0", "chatml"),
    "llama4": ("llama-4",),
    "llama4_text": ("llama-4",),
    "mimo": ("mimo",),
    "minicpm": ("minicpm",),
    "minimax_m2": ("minimax_m2",),
    "ministral3": ("ministral3",),
    "mistral": ("mistral_default", "mistral_v3", "ministral3", "open_hermes_mistral"),
    "mixtral": ("mistral_default",),
    "mpt": ("chatml",),
    "nemotron": ("nemotron",),
    "nemotron_h": ("nemotron_nano_v2", "chatml"),
    "olmo": ("olmo",),
    "olmo2": ("olmo2",),
    "olmo3": ("chatml",),
    "olmoe": ("olmo2",),
    "orion": ("orion",),
    "phi": ("phi-2",),
    "phi3": ("phi-3", "phi-4", "phi-4-14b"),
    "phimoe": ("phi-3",),
    "qwen2": ("qwen2", "deepseek_r1_qwen"),
    "qwen2_moe": ("qwen2",),
    "qwen3": ("qwen3",),
    "qwen3_5": ("qwen3_5", "qwen3_5_nothink"),
    "qwen3_5_moe": ("qwen3_5", "qwen3_5_nothink"),
    "qwen3_5_moe_text": ("qwen3_5", "qwen3_5_nothink"),
    "qwen3_5_text": ("qwen3_5", "qwen3_5_nothink"),
    "qwen3_moe": ("qwen3",),
    "qwen3_next": ("qwen3",),
    "rwkv5": ("rwkv_world",),
    "rwkv6": ("rwkv_world",),
    "rwkv7": ("rwkv_world",),
    "smollm3": ("smollm3",),
    "stablelm": ("stablelm-3b", "stablelm-2"),
    "starcoder2": ("starcoder2-instruct",),
}


@dataclass(frozen=True)
class Closest:
    """`template` writes `alike` of the probes as the chat template does."""

    template: ConvTemplate
    alike: int


def closest_template(chat: ChatTemplate, tokenizer: Tokenizer, model_type: str) -> Closest:
    """The best of CONV_TEMPLATES for a chat template, with the vocabulary's ids.

    The conversation with a system message counts most, if need be without its spaces. If nothing
    is alike, the family's only template is taken, or one that a token gives away. The result's
    default system message is the one that the chat template writes by itself.
    """
    expected = [_rendered(chat, probe, tokenizer) for probe in PROBES]
    best: tuple[tuple[bool, bool, int, bool], NamedTemplate] | None = None
    for name, entry in CONV_TEMPLATES.items():
        if "strftime_now" not in chat.source:  # a date must not be frozen in the file
            entry = _with_own_system_message(entry, expected[0])
        written = [_written(entry, probe) for probe in PROBES]
        alike = [ours == theirs for ours, theirs in zip(written, expected, strict=True)]
        nearly = _squeezed(written[1]) == _squeezed(expected[1])
        score = (alike[1], nearly, sum(alike), name.startswith(model_type))
        if (nearly or sum(alike) > 1) and (best is None or score > best[0]):
            best = score, entry
    if best is not None:
        return Closest(best[1].resolve(tokenizer), best[0][2])
    names = OF_FAMILY.get(model_type, ())
    if len(names) == 1 and _has_its_end(tokenizer, CONV_TEMPLATES[names[0]]):
        return Closest(CONV_TEMPLATES[names[0]].resolve(tokenizer), 0)
    for token, name in _FAMILIES.items():
        if tokenizer.token_to_id(token) is not None:
            return Closest(CONV_TEMPLATES[name].resolve(tokenizer), 0)
    return Closest(CONV_TEMPLATES["LM"].resolve(tokenizer), 0)


def _has_its_end(tokenizer: Tokenizer, entry: NamedTemplate) -> bool:
    return any(tokenizer.token_to_id(token) is not None for token in entry.stop)


def _squeezed(text: str | None) -> str | None:
    return None if text is None else "".join(text.split())


def _rendered(chat: ChatTemplate, probe: list[dict[str, Any]], tokenizer: Tokenizer) -> str | None:
    try:
        return chat.render(probe, special_tokens=tokenizer.special_tokens)
    except TemplateError:  # no system messages, or tools only
        return None


def _written(entry: NamedTemplate, probe: list[dict[str, Any]]) -> str:
    text = entry.template.render(probe)
    begin = "".join(entry.begin)
    return text if text.startswith(begin) else begin + text


def _with_own_system_message(entry: NamedTemplate, text: str | None) -> NamedTemplate:
    """The entry with the system message that `text`, a prompt for [_USER], has by itself."""
    mark = "\0"
    before, _, after = _written(entry, [{"role": "system", "content": mark}, _USER]).partition(mark)
    if (
        text is None
        or not text.startswith(before)
        or not text.endswith(after)
        or len(text) < len(before) + len(after)
    ):
        return entry
    message = text[len(before) : len(text) - len(after)]
    return NamedTemplate(
        entry.template.model_copy(update={"system_message": message}), entry.begin, entry.stop
    )
