"""The parts of the JavaScript driver that need no model, next to their Python counterparts."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relaxlm.errors import RequestError, TemplateError
from relaxlm.runtime.cache_size import pages_per_sequence
from relaxlm.runtime.chat_config import ChatConfigFile
from relaxlm.runtime.conv_template_table import get_conv_template
from relaxlm.runtime.generation import GenerationConfig, SamplingState
from relaxlm.runtime.metadata import CONTRACT
from relaxlm.runtime.page_pool import PagePool
from relaxlm.runtime.prompt import PromptBuilder
from relaxlm.runtime.sampling import Sampled, sample
from relaxlm.runtime.sequence_table import PagedSequences
from relaxlm.runtime.state_slots import StateSlots
from relaxlm.runtime.stop import StopStrings
from relaxlm.runtime.template import ChatTemplate, load_chat_templates
from relaxlm.runtime.tokenizer import Tokenizer
from relaxlm.web.npm import DRIVER
from tests.runtime.tokenizer_samples import byte_level_json
from tests.shared_data import SHARED, needs_shared_data
from tests.tiny_model import tokenizer_json
from tests.web.conftest import RunNode


def test_the_driver_follows_the_contract_of_the_libraries() -> None:
    """Change both together: a library that the driver does not understand is refused by it."""
    text = (DRIVER / "library.js").read_text()
    assert re.findall(r"const CONTRACT = (\d+);", text) == [str(CONTRACT)]


TRAFFIC = """
import { PagedSequences, PagePool } from "./page_tables.js";
import { StateSlots } from "./state_slots.js";
output(input.map(({ pages, size, window, sinks, slots, actions }) => {
  const states = slots ? new StateSlots(new PagePool(slots)) : null;
  const sequences = new PagedSequences(new PagePool(pages), size, window, sinks, states);
  return actions.map(([name, ...args]) => {
    try {
      const result = sequences[name](...args) ?? null;
      return name === "batch" ? Object.values(result) : result;
    } catch (error) {
      return error.name;
    }
  });
}));
"""


def made_up_traffic(rng: np.random.Generator) -> dict[str, Any]:
    """Actions on pools of pages and states, with what Python's sequences answer."""
    size, window = int(rng.integers(1, 5)), int(rng.choice([0, 0, 3, 9]))
    sinks = int(rng.integers(0, 6)) if window else 0
    pages = int(rng.integers(3, 12))
    slots = int(rng.choice([0, 3, 5]))
    states = StateSlots(PagePool(slots)) if slots else None
    sequences = PagedSequences(PagePool(pages), size, window, sinks, states=states)
    actions: list[list[Any]] = []
    answers: list[Any] = []
    alive: list[int] = []
    for _ in range(60):
        names = ["add", *["batch"] * 4, "truncate", "longest_prefix", "keep_state", "free"]
        name = str(rng.choice(names))
        arguments: list[Any] = []
        if name != "add":
            if not alive:
                continue
            seq = int(rng.choice(alive))
            if name == "batch":
                others = [other for other in alive if other != seq and rng.random() < 0.3]
                arguments = [[[s, int(rng.integers(1, 7))] for s in (seq, *others)]]
            elif name in ("truncate", "longest_prefix"):
                length = int(rng.integers(0, sequences.length(seq) + 1))
                # States are kept of few lengths: more than half of these calls go to one of them.
                if rng.random() < 0.6:
                    length = sequences.longest_prefix(seq, length)
                arguments = [seq, length]
            else:
                arguments = [seq]
        try:
            call = {"batch": lambda steps: sequences.batch([tuple(step) for step in steps])}
            result: Any = call.get(name, getattr(sequences, name))(*arguments)
        except RequestError as error:  # ContextOverflowError is one, too
            result = type(error).__name__
        if name == "batch" and not isinstance(result, str):
            result = [column.tolist() for column in result[: 9 if slots else 7]]
        if name == "add":
            alive.append(result)
        if name == "free":
            alive.remove(arguments[0])
        camel = {"keep_state": "keepState", "longest_prefix": "longestPrefix"}
        actions.append([camel.get(name, name), *arguments])
        answers.append(result)
    game = {"pages": pages, "size": size, "window": window, "sinks": sinks, "slots": slots}
    return {**game, "actions": actions, "answers": answers}


def test_page_tables_are_those_of_python(node: RunNode) -> None:
    rng = np.random.default_rng(3)
    games = [made_up_traffic(rng) for _ in range(60)]
    answers = node(TRAFFIC, games)
    assert any("ContextOverflowError" in game["answers"] for game in games)
    assert any("RequestError" in game["answers"] for game in games)
    for game, found in zip(games, answers, strict=True):
        assert found == game["answers"], game["actions"]


def test_as_many_pages_are_planned_as_in_python(node: RunNode) -> None:
    cases = [(1000, 64, 16, 0, 0), (1000, 64, 16, 100, 4), (30, 64, 16, 100, 20), (5, 1, 4, 2, 0)]
    script = 'import { pagesPerSequence } from "./page_tables.js";'
    script += "output(input.map((c) => pagesPerSequence(...c)));"
    assert node(script, cases) == [pages_per_sequence(*case) for case in cases]


def test_seeds_give_the_numbers_of_numpy(node: RunNode) -> None:
    seeds = [0, 1, 42, 2**31, 2**32, 2**40 + 17, -1, 2**53 - 1]
    script = 'import { Random } from "./random.js"; output(input.map((seed) => {'
    script += "const random = new Random(seed); return [1, 2, 3].map(() => random.uniform()); }));"
    for seed, found in zip(seeds, node(script, seeds), strict=True):
        state = SamplingState(GenerationConfig(seed=seed), [], 4)
        assert found == [state.uniform() for _ in range(3)]


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.7},
    {"temperature": 1.0},
    {"temperature": 0.3, "top_p": 0.8},
    {"temperature": 2.5, "top_k": 7},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.5},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 0.9, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 1.1, "presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 1.0, "logit_bias": {"3": 8.5, "5": -90}},
]
SAMPLE = """
import { Sampler } from "./sampling.js";
import { generationSettings } from "./settings.js";
output(input.settings.map((settings) => {
  const sampler = new Sampler(generationSettings(settings), input.prompt, input.vocab);
  return input.logits.map((row) => sampler.choose(Float32Array.from(row)));
}));
"""


SAMPLE_FEW = """
import { BLOCK, FewLogits } from "./few_logits.js";
import { Sampler } from "./sampling.js";
import { generationSettings } from "./settings.js";
output(input.settings.map((settings) => {
  const sampler = new Sampler(generationSettings(settings), input.prompt, input.vocab);
  const [tokens, asked, enough] = [[], [], []];
  for (const numbers of input.logits) {
    const row = Float32Array.from(numbers);
    const count = Math.ceil(row.length / BLOCK);
    const blocks = [...Array(count).keys()];
    const logits = blocks.map((block) => {
      const padded = new Float32Array(BLOCK).fill(-Infinity);
      padded.set(row.subarray(block * BLOCK, (block + 1) * BLOCK));
      return padded;
    });
    const peaks = Float32Array.from(logits, (block) => Math.max(...block));
    const wanted = sampler.blocksRead(count);
    let token = null;
    if (wanted) {
      const highest = blocks.toSorted((a, b) => peaks[b] - peaks[a]).slice(0, wanted.largest);
      const found = new Map([...highest, ...wanted.named].map((block) => [block, logits[block]]));
      token = sampler.choose(new FewLogits(peaks, found, input.vocab));
    }
    asked.push(wanted !== null);
    enough.push(token !== null);
    tokens.push(token ?? sampler.choose(row));
  }
  return { tokens, asked, enough };
}));
"""
# Settings, and in how many of 8 rows a few blocks are asked for and enough.
FEW: list[tuple[dict[str, Any], int, range]] = [
    ({"temperature": 0}, 8, range(6, 9)),
    ({"temperature": 0, "repetition_penalty": 1.7}, 8, range(6, 9)),
    ({"temperature": 0, "logit_bias": {"9000": 90, "10301": 99}}, 8, range(6, 9)),
    # What is largest without the bias is not enough.
    ({"temperature": 0, "logit_bias": {str(id): -90 for id in range(700, 768)}}, 8, range(2, 8)),
    ({"temperature": 1.5, "top_k": 5, "top_p": 0.9}, 8, range(6, 9)),
    ({"temperature": 1.5, "top_k": 3, "repetition_penalty": 1.3, "min_p": 0.1}, 8, range(4, 9)),
    (
        {"temperature": 1.1, "top_k": 4, "presence_penalty": 1, "frequency_penalty": 2},
        8,
        range(4, 9),
    ),
    ({"temperature": 1, "top_k": 40}, 0, range(1)),
    ({"temperature": 1, "top_p": 0.9}, 0, range(1)),
]


def test_few_blocks_of_logits_give_the_tokens_of_the_whole_row(node: RunNode) -> None:
    rng = np.random.default_rng(4)
    vocab = 40 * 256 + 77
    logits = np.round(rng.normal(0, 3, (8, vocab + 40)), 2).astype(np.float32)  # ties
    logits[:, vocab:] = [[50]] + [[-20]] * 7  # padding; in a row, its block comes first
    logits[2:5, 730:740] += 30
    logits[5, vocab - 1] = 40
    settings = [{**options, "seed": seed} for seed, (options, _, _) in enumerate(FEW)]
    prompt = [3, 7, 3, 9000]
    data = {"logits": logits.tolist(), "settings": settings, "prompt": prompt, "vocab": vocab}
    answers = node(SAMPLE_FEW, data)
    for (_, asked, enough), options, found in zip(FEW, settings, answers, strict=True):
        state = SamplingState(GenerationConfig(**options), prompt, vocab)
        expected = [sample(row[None], [state])[0] for row in logits]
        assert found["tokens"] == [one.token for one in expected if isinstance(one, Sampled)]
        assert (sum(found["asked"]), sum(found["enough"]) in enough) == (asked, True), options


def test_the_same_logits_and_seed_give_the_tokens_of_python(node: RunNode) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (40, 100)).astype(np.float32)
    logits[:, 10:30] = np.round(logits[:, 10:30])  # ties
    settings = [{**options, "seed": seed} for options in SETTINGS for seed in (1, 2, 3)]
    prompt, vocab = [3, 7, 3, 90], 97  # the rest is padding
    data = {"logits": logits.tolist(), "settings": settings, "prompt": prompt, "vocab": vocab}
    for options, found in zip(settings, node(SAMPLE, data), strict=True):
        state = SamplingState(GenerationConfig(**options), prompt, vocab)
        expected = []
        for row in logits:
            (sampled,) = sample(row[None], [state])
            assert isinstance(sampled, Sampled)
            expected.append(sampled.token)
        assert found == expected, options


def test_options_that_are_not_possible_are_refused_by_name(node: RunNode) -> None:
    script = 'import { generationSettings } from "./settings.js"; output(input.map((given) => {'
    script += "try { return generationSettings(given); }"
    script += "catch (error) { return `${error.name}: ${error.message}`; } }));"
    wrong = [{"temperatur": 1}, {"top_p": 1.5}, {"stop": [""]}, {"seed": 0.5}, {"max_tokens": 0}]
    unknown, top_p, stop, seed, tokens, good = node(script, [*wrong, {"top_k": -1, "stop": "x"}])
    assert unknown.startswith("RequestError: 'temperatur' is not a generation option: expected one")
    assert top_p == "RequestError: top_p = 1.5 is not possible: expected a number from 0 to 1"
    assert stop == (
        'RequestError: stop = [""] is not possible: expected a text or a list of texts, none of '
        "them empty"
    )
    assert seed == (
        "RequestError: seed = 0.5 is not possible: expected a whole number from -2**63 to 2**64 - 1"
    )
    assert (
        tokens == "RequestError: max_tokens = 0 is not possible: expected a whole number, 1 or more"
    )
    assert (good["top_k"], good["stop"], good["temperature"]) == (0, ["x"], 1)


def test_stop_strings_hold_back_and_cut_as_in_python(node: RunNode) -> None:
    rng = np.random.default_rng(1)
    cases = []
    for _ in range(300):
        stops = ["".join(rng.choice(list("ab"), rng.integers(1, 4))) for _ in range(2)]
        pieces = ["".join(rng.choice(list("abc"), rng.integers(0, 4))) for _ in range(6)]
        cases.append({"stops": stops, "pieces": pieces})
    script = 'import { StopStrings } from "./stop.js"; output(input.map(({ stops, pieces }) => {'
    script += "const found = new StopStrings(stops);"
    script += "return [...pieces.map((piece) => found.push(piece)), found.flush()]; }));"
    for case, found in zip(cases, node(script, cases), strict=True):
        expected = StopStrings(case["stops"])
        assert found == [*(expected.push(p)[0] for p in case["pieces"]), expected.flush()], case


TOKENIZE = """
import { Tokenizer } from "./tokenizer.js";
const read = (name) => JSON.parse(readFileSync(name, "utf8"));
output(input.map(({ file, settings, texts, ids }) => {
  const tokenizer = new Tokenizer(read(file), settings);
  const decoded = ids.map((row) => {
    const decoder = tokenizer.stream();
    return [...row.map((id) => decoder.push([id])), decoder.finish()];
  });
  return {
    encoded: texts.map((text) => tokenizer.encode(text)),
    decoded,
    vocabSize: tokenizer.vocabSize,
    eos: tokenizer.eosId ?? null,
    addsBos: tokenizer.addsBos,
  };
}));
"""
TEXTS = [
    "Hello, world!",
    "  two spaces, a tab\tand\n\nlines \n",
    "naïve café, größer, 日本語 🙂 x²",
    "def f(x):\n    return x + 1  # 123456",
    "I'm you're it's <|im_start|>user\nHi<|im_end|>",
    "",
]


def compare_tokenizers(node: RunNode, folders: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    rng = np.random.default_rng(5)
    cases, ours = [], []
    for file, settings in folders.values():
        tokenizer = Tokenizer(file.read_bytes(), settings, str(file))
        rows = [rng.integers(0, tokenizer.vocab_size, 60).tolist() for _ in range(3)]
        rows += [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
        cases.append({"file": str(file), "settings": settings, "texts": TEXTS, "ids": rows})
        ours.append(tokenizer)
    for name, case, tokenizer, found in zip(
        folders, cases, ours, node(TOKENIZE, cases), strict=True
    ):
        for text, ids in zip(TEXTS, found["encoded"], strict=True):
            assert ids == tokenizer.encode(text, add_special_tokens=False), (name, text)
        for row, pieces in zip(case["ids"], found["decoded"], strict=True):
            stream = tokenizer.stream()
            assert pieces == [*(stream.push([i]) for i in row), stream.finish()], name
        assert found["vocabSize"] == tokenizer.vocab_size, name
        assert found["eos"] == tokenizer.eos_id, name
        assert found["addsBos"] == tokenizer.adds_bos, name


def test_tokens_and_texts_are_those_of_python(node: RunNode, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(tokenizer_json())
    compare_tokenizers(node, {"tiny": (file, {"eos_token": "<|im_end|>"})})


@needs_shared_data
def test_real_tokenizers_agree_with_python(node: RunNode) -> None:
    folders = {}
    for file in sorted((SHARED / "tokenizers").glob("*/tokenizer.json")):
        settings_file = file.with_name("tokenizer_config.json")
        settings = json.loads(settings_file.read_text()) if settings_file.is_file() else {}
        folders[file.parent.name] = (file, settings)
    if not folders:
        pytest.skip("no tokenizers among the shared data")
    compare_tokenizers(node, folders)


STOPS = """
import { PromptBuilder } from "./prompt.js";
import { Tokenizer } from "./tokenizer.js";
const read = (name) => JSON.parse(readFileSync(name, "utf8"));
const made = new Tokenizer(read(input.file), input.settings);
const ends = (config) => [...new PromptBuilder(config, made).stopTokenIds];
output(input.configs.map((config) => ends(config).sort((a, b) => a - b)));
"""
TURNS = "{% for m in messages %}{{ m.role + ': ' + m.content }}END{% endfor %}"
ENDS = (
    "<|im_end|>\n",
    " <|im_end|><|im_start|>",
    "<|im_start|>",
    "\n",
    " end",
    "<|channel|><|message|>",
)


def test_answers_end_where_they_do_in_python(node: RunNode, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(byte_level_json().encode())
    for settings in ({}, {"bos_token": "<|im_start|>"}, {"eos_token": "<|im_start|>"}):
        tokenizer = Tokenizer(file.read_bytes(), settings)
        configs = [
            {
                **{"model_type": "llama", "quantization": "q0f32", "model_config": {}},
                **{"vocab_size": 320, "context_window_size": 128, "eos_token_id": [7]},
                "relaxlm": {"chat_template": source},
            }
            for source in [*(TURNS.replace("END", end) for end in ENDS), "{{ raise_exception() }}"]
        ]
        data = {"file": str(file), "settings": settings, "configs": configs}
        expected = [PromptBuilder(ChatConfigFile.parse(c), tokenizer) for c in configs]
        found = node(STOPS, data)
        assert found == [sorted(prompts.stop_token_ids) for prompts in expected]
        assert len(set(map(tuple, found))) > 1


CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be {kind}."},
        {"role": "user", "content": "A $& B"},
        {"role": "assistant", "content": "<think>well</think>\n\nyes"},
        {"role": "user", "content": "more"},
    ],
]
PROMPTS = """
import { PromptBuilder } from "./prompt.js";
const tokenizer = {
  ...{ specialTokens: input.specialTokens, eosId: undefined, specialIds: new Set() },
  ...{ encode: () => [], backend: { token_to_id() {} } },
};
output(input.configs.map((config) => {
  const prompts = new PromptBuilder(config, tokenizer);
  return input.conversations.map((messages) => {
    try {
      return prompts.text(messages);
    } catch (error) {
      return `${error.name}: ${error.message}`;
    }
  });
}));
"""


def test_conv_templates_write_the_prompts_of_python(node: RunNode, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(tokenizer_json())
    tokenizer = Tokenizer(file.read_bytes())
    names = [
        "chatml",
        "qwen3",
        "llama-3",
        "mistral_default",
        "gemma_instruction",
        "phi-3",
        "llama-2",
    ]
    templates = [get_conv_template(name).resolve(tokenizer) for name in names]
    configs = [{"conv_template": template.model_dump(mode="json")} for template in templates]
    data = {"configs": configs, "conversations": CONVERSATIONS, "specialTokens": {}}
    for template, found in zip(templates, node(PROMPTS, data), strict=True):
        assert found == [template.render(messages) for messages in CONVERSATIONS], template.name


@needs_shared_data
def test_real_chat_templates_write_the_prompts_of_python(node: RunNode) -> None:
    names, configs, expected = [], [], []
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    for folder in sorted(path for path in (SHARED / "tokenizers").iterdir() if path.is_dir()):
        source = load_chat_templates(folder).get("default")
        if source is None:
            continue
        template = ChatTemplate(source, folder.name)
        prompts = []
        for messages in CONVERSATIONS:
            try:
                prompts.append(template.render(messages, special_tokens=special))
            except TemplateError:
                prompts.append("TemplateError")
        names.append(folder.name)
        configs.append({"relaxlm": {"chat_template": source, "special_tokens": special}})
        expected.append(prompts)
    data = {"configs": configs, "conversations": CONVERSATIONS, "specialTokens": {}}
    for name, prompts, found in zip(names, expected, node(PROMPTS, data), strict=True):
        found = [text.split(":")[0] if text.startswith("TemplateError") else text for text in found]
        assert found == prompts, name
