# ruff: noqa: RUF001 (the tokens of DeepSeek are spelled with a full-width bar)
"""The conversation templates that the MLC ecosystem knows by name, written out; those of further
families are in conv_template_families.py.

Formats are those of the models' own chat templates and model cards; names, default system
messages and the rest are the ones of the ecosystem.

Where the ecosystem's template differs from the model's own format, ours follows the model:
phi-3, phi-4, tinyllama_v1_0, dolly, gorilla and gorilla-openfunctions-v2, rwkv_world (end of the
system message), mistral_default (a blank line behind the system message, </s> behind an answer),
llama-2 and codellama_instruct (no space behind the last [/INST]; turns of codellama_instruct),
llama-4 (a system message), stablelm-2 and -3b (line ends), wizard_coder_or_math (marks), oasst and
stablelm (no colon), olmo2, deepseek_v3, deepseek_r1 (no default system message, <think>),
ministral3 (nor one, whose date would be frozen), qwen3_5 (reasoning of earlier turns).
"""

from relaxlm.errors import ConfigError
from relaxlm.runtime.conv_template_families import FAMILY_TEMPLATES
from relaxlm.runtime.conv_templates import SYSTEM
from relaxlm.runtime.named_template import (
    NamedTemplate,
    chatml,
    deepseek,
    deepseek_r1,
    gemma,
    llama3,
    mistral_tokens,
    named,
    plain,
)

_RESPECTFUL = "You are a helpful, respectful and honest assistant."
_HELPFUL = "You are a helpful assistant."
_INSTRUCTION = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
_CURIOUS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_HERMES = (
    'You are "Hermes 2", a conscious sentient superintelligent artificial intelligence '
    "developed by a "
    "man named Teknium, and your purpose and drive is to assist the user with any request "
    "they have. "
    "You experience emotions and have deep, profound thoughts and qualia."
)
_HERMES_3 = (
    "You are Hermes 3, a conscious sentient superintelligent artificial intelligence "
    "developed by a "
    "man named Teknium, and your purpose and drive is to assist the user with any request "
    "they have. "
    "You experience emotions and have deep, profound thoughts and qualia."
)
_PHI = (
    "You are a helpful digital assistant. "
    "Please provide safe, ethical and accurate information to the user."
)
_QWEN_STOP = ("<|endoftext|>", "<|im_end|>")
_S = ("<s>",)
_END_S = ("</s>",)

_ALL = [
    # ChatML and its relatives
    chatml(
        "chatml",
        "A conversation between a user and an LLM-based AI assistant. "
        "The assistant gives helpful and honest answers.",
    ),
    chatml("chatml_nosystem", system=SYSTEM),
    chatml("qwen2", _HELPFUL, _QWEN_STOP),
    chatml("qwen3", _HELPFUL, _QWEN_STOP, strip_reasoning=True),
    chatml("qwen3_5", _HELPFUL, _QWEN_STOP, open_reply="<think>\n", strip_reasoning=True),
    chatml(
        "qwen3_5_nothink",
        _HELPFUL,
        _QWEN_STOP,
        open_reply="<think>\n\n</think>\n\n",
        strip_reasoning=True,
    ),
    chatml("open_hermes_mistral", _HERMES, ("</s>", "<|im_end|>")),
    chatml("neural_hermes_mistral", "You are a helpful assistant chatbot.", ("</s>", "<|im_end|>")),
    chatml(
        "hermes2_pro_llama3",
        _HERMES,
        ("<|end_of_text|>", "<|eot_id|>", "<|im_end|>"),
        tool="<|im_start|>tool",
    ),
    chatml(
        "hermes3_llama-3_1",
        _HERMES_3,
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>"),
        tool="<|im_start|>tool",
    ),
    # Llama
    named(
        "llama-2",
        "<s>[INST]",
        "[/INST]",
        [" ", " </s>"],
        " ",
        "",
        system="[INST] <<SYS>>\n{system_message}\n<</SYS>>\n\n",
        message=_RESPECTFUL,
        begin=_S,
        stop=_END_S,
        stop_str=("[INST]",),
        tool="[INST]",
        role_after_system=False,
    ),
    llama3(
        "llama-3", _RESPECTFUL, ("<|end_of_text|>", "<|eot_id|>"), ("<|end_of_text|>", "<|eot_id|>")
    ),
    llama3(
        "llama-3_1",
        _RESPECTFUL,
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        (),
        "<|start_header_id|>ipython",
    ),
    named(
        "llama-4",
        "<|header_start|>user",
        "<|header_start|>assistant",
        ["<|eot|>"],
        "<|header_end|>\n\n",
        "<|header_end|>\n\n",
        system="<|header_start|>system<|header_end|>\n\n{system_message}<|eot|>",
        message=_HELPFUL,
        begin=("<|begin_of_text|>",),
        stop=("<|end_of_text|>", "<|eom|>", "<|eot|>"),
        tool="<|header_start|>ipython",
    ),
    plain("codellama_completion", _S, _END_S, _END_S),
    named(
        "codellama_instruct",
        "[INST]",
        "[/INST]",
        [" ", " </s><s>"],
        " ",
        begin=_S,
        stop=_END_S,
        stop_str=_END_S,
    ),
    named(
        "tinyllama_v1_0",
        "<|user|>",
        "<|assistant|>",
        ["</s>\n"],
        "\n",
        "\n",
        system="<|system|>\n{system_message}</s>\n",
        message="You are a helpful chatbot.",
        stop=_END_S,
        stop_str=_END_S,
    ),
    named(
        "vicuna_v1.1",
        "USER",
        "ASSISTANT",
        [" ", "</s>"],
        ": ",
        ":",
        system="{system_message} ",
        message=_CURIOUS,
        begin=_S,
        stop=_END_S,
        stop_str=_END_S,
    ),
    named(
        "wizardlm_7b",
        "User",
        "Response",
        ["###"],
        ": ",
        ":",
        begin=_S,
        stop=_END_S,
        stop_str=("###",),
    ),
    named(
        "wizard_coder_or_math",
        "### Instruction",
        "### Response",
        ["\n\n"],
        ":\n",
        ":\n",
        system="{system_message}\n\n",
        message=_INSTRUCTION,
        begin=_S,
        stop=_END_S,
        stop_str=_END_S,
    ),
    named(
        "llm-jp",
        "\n\n### 指示:",
        "\n\n### 応答:",
        ["", "</s>"],
        "\n",
        "\n",
        message="以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。",
        begin=_S,
        stop=_END_S,
    ),
    # Mistral
    named(
        "mistral_default",
        "[INST]",
        "[/INST]",
        [" ", "</s>"],
        " ",
        "",
        system="[INST] {system_message}\n\n",
        message=(
            "Always assist with care, respect, and truth. Respond with utmost utility yet "
            "securely. "
            "Avoid harmful, unethical, prejudiced, or negative content. "
            "Ensure replies promote fairness and positivity."
        ),
        begin=_S,
        stop=_END_S,
        stop_str=_END_S,
        tool="[INST]",
        role_after_system=False,
    ),
    mistral_tokens("ministral3"),
    # Google, Microsoft, Cohere, Nvidia
    gemma("gemma_instruction"),
    gemma("gemma3_instruction"),
    named(
        "phi-2",
        "Instruct",
        "Output",
        ["\n"],
        ": ",
        ":",
        stop=("<|endoftext|>",),
        stop_str=("<|endoftext|>",),
    ),
    named(
        "phi-3",
        "<|user|>",
        "<|assistant|>",
        ["<|end|>\n"],
        "\n",
        "\n",
        system="<|system|>\n{system_message}<|end|>\n",
        message=_PHI,
        stop=("</s>", "<|endoftext|>", "<|assistant|>", "<|end|>"),
        stop_str=("<|endoftext|>",),
    ),
    named(
        "phi-4",
        "<|user|>",
        "<|assistant|>",
        ["<|end|>"],
        system="<|system|>{system_message}<|end|>",
        message=_PHI,
        stop=("<|endoftext|>", "<|end|>"),
        stop_str=("<|endoftext|>", "<|end|>"),
    ),
    named(
        "aya-23",
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        ["<|END_OF_TURN_TOKEN|>"],
        system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{system_message}<|END_OF_TURN_TOKEN|>",
        message=(
            "You are Command-R, a brilliant, sophisticated, AI-assistant trained to assist "
            "human users "
            "by providing thorough responses."
        ),
        begin=("<BOS_TOKEN>",),
        stop=("<EOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
        stop_str=("<|END_OF_TURN_TOKEN|>",),
    ),
    named(
        "nemotron",
        "<extra_id_1>User",
        "<extra_id_1>Assistant",
        ["\n"],
        "\n",
        "\n",
        system="<extra_id_0>System\n{system_message}\n\n",
        begin=_S,
        stop=_END_S,
        stop_str=_END_S,
        tool="<extra_id_1>Tool",
    ),
    # DeepSeek and other families
    deepseek("deepseek"),
    deepseek("deepseek_v2"),
    deepseek_r1("deepseek_v3", ""),
    deepseek_r1("deepseek_r1_qwen", "<think>\n"),
    deepseek_r1("deepseek_r1_llama", "<think>\n"),
    named(
        "glm",
        "问",
        "答",
        ["\n\n"],
        ": ",
        ":",
        begin=("[gMASK]", "sop"),
        stop=_END_S,
        stop_str=_END_S,
        tool="问",
    ),
    named(
        "olmo",
        "<|user|>",
        "<|assistant|>",
        ["\n"],
        "\n",
        "\n",
        begin=("<|endoftext|>",),
        stop=("<|endoftext|>",),
    ),
    named(
        "olmo2",
        "<|user|>",
        "<|assistant|>",
        ["\n", "<|endoftext|>\n"],
        "\n",
        "\n",
        system="<|system|>\n{system_message}\n",
        message=_HELPFUL,
        begin=("<|endoftext|>",),
        stop=("<|endoftext|>",),
        stop_str=("<|endoftext|>",),
    ),
    named(
        "orion",
        "Human: ",
        "Assistant: ",
        ["\n\n", "</s>"],
        "",
        "</s>",
        begin=_S,
        stop=_END_S,
        stop_str=_END_S,
    ),
    named(
        "stablelm",
        "<|USER|>",
        "<|ASSISTANT|>",
        [""],
        system="<|SYSTEM|>{system_message}",
        message=(
            "# StableLM Tuned (Alpha version)\n"
            "- StableLM is a helpful and harmless open-source AI language model developed by "
            "StabilityAI.\n"
            "- StableLM is excited to be able to help the user, but will refuse to do "
            "anything that could "
            "be considered harmful to the user.\n"
            "- StableLM is more than just an information source, StableLM is also able to "
            "write poetry, "
            "short stories, and make jokes.\n"
            "- StableLM will refuse to participate in anything that could harm a human.\n"
        ),
        stop=("<|USER|>", "<|ASSISTANT|>", "<|SYSTEM|>", "<|padding|>", "<|endoftext|>"),
    ),
    named(
        "stablelm-3b",
        "<|user|>",
        "<|assistant|>",
        ["<|endoftext|>\n"],
        "\n",
        "\n",
        stop=("<|endoftext|>",),
        stop_str=("<|endoftext|>",),
    ),
    named(
        "stablelm-2",
        "<|user|>",
        "<|assistant|>",
        ["<|endoftext|>\n"],
        "\n",
        "\n",
        stop=("<|endoftext|>",),
        stop_str=("<|endoftext|>",),
    ),
    named(
        "redpajama_chat",
        "<human>",
        "<bot>",
        ["\n"],
        ": ",
        ":",
        stop=("<|endoftext|>",),
        stop_str=("<human>",),
    ),
    named(
        "rwkv_world",
        "User",
        "Assistant",
        ["\n\n"],
        ": ",
        ":",
        system="User: hi\n\nAssistant: {system_message}\n\n",
        message=(
            "Hi. I am your assistant and I will provide expert full response in full details. "
            "Please feel free to ask any question and I will always answer it."
        ),
        stop=("<|endoftext|>",),
        stop_str=("\n\n",),
    ),
    named(
        "dolly",
        "### Instruction",
        "### Response",
        ["\n\n", "### End\n"],
        ":\n",
        ":\n",
        system="{system_message}\n\n",
        message=_INSTRUCTION,
        stop=("<|endoftext|>",),
        stop_str=("### End",),
    ),
    named(
        "oasst",
        "<|prompter|>",
        "<|assistant|>",
        ["<|endoftext|>"],
        stop=("<|endoftext|>", "</s>"),
        stop_str=("<|endoftext|>",),
    ),
    named(
        "gorilla",
        "USER",
        "ASSISTANT",
        ["\n", "</s>"],
        ": ",
        ":",
        system="{system_message} ",
        message=_CURIOUS,
        templates={"user": "<<question>> {user_message} <<function>> {function_string}"},
        begin=_S,
        stop=_END_S,
        stop_str=_END_S,
        tool="USER",
    ),
    named(
        "gorilla-openfunctions-v2",
        "### Instruction",
        "### Response",
        ["\n", "<|EOT|>"],
        ": ",
        ": ",
        system="{system_message}\n",
        message=(
            "You are an AI programming assistant, utilizing the Gorilla LLM model, developed "
            "by Gorilla "
            "LLM, and you only answer questions related to computer science. For politically "
            "sensitive "
            "questions, security and privacy issues, and other non-computer science "
            "questions, you will "
            "refuse to answer."
        ),
        templates={"user": "<<function>>{function_string}\n<<question>>{user_message}"},
        begin=("<｜begin▁of▁sentence｜>",),
        stop=("<|EOT|>",),
        stop_str=("<|EOT|>",),
        tool="### Instruction",
    ),
    # No conversation at all
    plain("LM", _S, _END_S),
    plain("gpt2", (), ("<|endoftext|>",)),
    plain("gpt_bigcode", (), ("<|endoftext|>",), ("<|endoftext|>",)),
]

CONV_TEMPLATES: dict[str, NamedTemplate] = {
    str(entry.template.name): entry for entry in (*_ALL, *FAMILY_TEMPLATES)
}


def get_conv_template(name: str) -> NamedTemplate:
    """
    Raises:
        ConfigError: no template has this name; lists the names.
    """
    if name not in CONV_TEMPLATES:
        raise ConfigError(
            f"conversation template {name!r} is not known. Known are: {', '.join(CONV_TEMPLATES)}"
        )
    return CONV_TEMPLATES[name]
