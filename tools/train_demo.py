"""Train the demo model from nothing and write `relaxlm/demo/model/`.

    python tools/train_demo.py [--steps N] [--output FOLDER]

One core, about 25 minutes; the same bytes on every run on the same machine and torch release. The
text comes from `relaxlm.demo.world`. Needs torch and transformers (the `test` extra).
"""

import argparse
import itertools
import json
import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from relaxlm.demo import MODEL_DIR
from relaxlm.demo.world import (
    Conversation,
    Question,
    grade,
    held_out_questions,
    held_out_texts,
    in_long_chat,
    training_conversations,
    training_texts,
)

SEED = 1
START, END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
STOP = [2, 0]  # the ids of END and TEXT_END
VOCABULARY = 1024
CONTEXT = 1024  # max_position_embeddings
ROW = 320  # tokens of one packed training row
ROWS = 8  # rows in a batch
PEAK_RATE = 2e-3
USER_WEIGHT = 0.1  # of the loss on what the user says; the assistant's words count 1
TEXT_SHARE = 0.22  # plain documents among the training documents

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] == 'system' and not loop.first %}
        {{- raise_exception('The system message must come first.') }}
    {%- elif message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('Unknown role: ' + message['role']) }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

Document = tuple[list[int], list[float], list[int]]  # token ids, loss weights, positions


def train_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE in which a digit is always one token.

    The merges are learnt on text without its non-ASCII characters, so that each of those stays
    two to four tokens: the demo then exercises decoding across UTF-8 boundaries.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"'s| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[TEXT_END, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    chats = itertools.islice(training_conversations(seed), 4000)
    texts = [f"{m['role']}\n{m['content']}\n" for chat in chats for m in chat]
    texts += itertools.islice(training_texts(seed), 1000)
    ascii_only = ("".join(c if c.isascii() else "\n" for c in text) for text in texts)
    tokenizer.train_from_iterator(ascii_only, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY, tokenizer.get_vocab_size()
    return tokenizer


def encode_chat(tokenizer: Tokenizer, chat: Conversation, rng: random.Random) -> Document:
    """The tokens that the chat template gives.

    Every third conversation gets random gaps of positions between its turns, so that distances
    longer than a training row occur too.
    """
    ids: list[int] = []
    weights: list[float] = []
    positions: list[int] = []
    gaps = rng.random() < 0.35
    room = CONTEXT - 2 * ROW
    position = 0
    for message in chat:
        if gaps and message["role"] == "user":
            gap = rng.randrange(room // 2 + 1)
            position, room = position + gap, room - gap
        head = tokenizer.encode(f"{START}{message['role']}\n").ids
        body = tokenizer.encode(f"{message['content']}{END}").ids
        tail = tokenizer.encode("\n").ids
        assistant = message["role"] == "assistant"
        user = USER_WEIGHT * (message["role"] == "user")
        ids += head + body + tail
        weights += [0.0] * len(head) + [1.0 if assistant else user] * len(body) + [0.0] * len(tail)
        positions += range(position, position + len(head) + len(body) + len(tail))
        position = positions[-1] + 1
    return ids, weights, positions


def documents(tokenizer: Tokenizer, seed: int) -> Iterator[Document]:
    rng = random.Random(f"documents {seed}")
    chats, texts = training_conversations(seed), training_texts(seed)
    while True:
        if rng.random() < TEXT_SHARE:
            ids = tokenizer.encode(next(texts) + TEXT_END).ids
            document: Document = (ids, [1.0] * len(ids), list(range(len(ids))))
        else:
            document = encode_chat(tokenizer, next(chats), rng)
        if len(document[0]) <= ROW:
            yield document


def rows(stream: Iterator[Document]) -> Iterator[torch.Tensor]:
    """Pack documents into rows [4, ROW] float32: ids, loss weights, positions, document numbers."""
    pool = list(itertools.islice(stream, 64))
    while True:
        row = torch.zeros(4, ROW)
        row[3] = -1
        used = number = 0
        while fitting := [i for i, d in enumerate(pool) if len(d[0]) <= ROW - used]:
            # The oldest opens a row, so that none waits forever; then the longest that fits.
            best = max(fitting, key=lambda i: len(pool[i][0])) if used else 0
            ids, weights, positions = pool.pop(best)
            pool.append(next(stream))
            part = row[:, used : used + len(ids)]
            part[0], part[1] = torch.tensor(ids), torch.tensor(weights)
            part[2], part[3] = torch.tensor(positions), number
            part[1, 0] = 0  # nothing predicts the first token of a document
            used, number = used + len(ids), number + 1
        yield row


def batches(tokenizer: Tokenizer, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    stream = rows(documents(tokenizer, seed))
    causal = torch.ones(ROW, ROW, dtype=torch.bool).tril()
    while True:
        ids, weights, positions, number = torch.stack(list(itertools.islice(stream, ROWS)), 1)
        same = number[:, :, None] == number[:, None, :]
        yield {
            "input_ids": ids.long(),
            "position_ids": positions.long(),
            "attention_mask": torch.where(same & causal, 0.0, -1e9)[:, None].bfloat16(),
            "weights": weights,
        }


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=STOP,
        pad_token_id=0,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Plain grouped-query attention; torch's own is slower backwards at these sizes on a CPU.

    query [batch, heads, ROW, head_dim], key and value [batch, kv_heads, ROW, head_dim], mask
    [batch, 1, ROW, ROW] added to the scores -> [batch, ROW, heads, head_dim].
    """
    b, heads, length, size = query.shape
    groups = key.shape[1]
    # Queries that share a key head are rows of one matrix product.
    query = (query * scaling).reshape(b, groups, -1, size)
    scores = (query @ key.transpose(2, 3)).view(b, groups, -1, length, length) + mask[:, :, None]
    weights = torch.softmax(scores, -1).view(b, groups, -1, length)
    out = (weights.to(value.dtype) @ value).view(b, heads, length, size)
    return out.transpose(1, 2).contiguous(), None


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, steps: int, seed: int) -> float:
    """Returns the mean loss of the last hundred steps."""
    hidden, others = [], []
    for name, parameter in model.named_parameters():
        (hidden if parameter.dim() == 2 and "embed" not in name else others).append(parameter)
    # Muon needs about half of AdamW's steps here; it is meant for hidden matrices only.
    optimizers = [
        torch.optim.Muon(hidden, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    ALL_ATTENTION_FUNCTIONS.register("demo", attention)
    model.set_attn_implementation("demo")
    recent: list[float] = []
    started = time.process_time()
    model.train()
    for step, batch in enumerate(itertools.islice(batches(tokenizer, seed), steps)):
        rate = min((step + 1) / 100, 0.51 + 0.49 * math.cos(math.pi * step / steps)) * PEAK_RATE
        weights = batch.pop("weights")[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), batch["input_ids"][:, 1:], reduction="none"
        )
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        recent = [*recent[-99:], loss.item()]
        if step % 100 == 99:
            minutes = (time.process_time() - started) / 60
            mean = sum(recent) / len(recent)
            print(f"step {step + 1}: loss {mean:.4f}, {minutes:.1f} minutes", flush=True)
        if step % 1000 == 999:
            model.set_attn_implementation("sdpa")
            print(evaluate(model, tokenizer, held_out_questions()[:200]), flush=True)
            model.set_attn_implementation("demo")
            model.train()
    model.set_attn_implementation("sdpa")
    return sum(recent) / len(recent)


def render(messages: tuple[dict[str, str], ...]) -> str:
    """What `CHAT_TEMPLATE` gives with a generation prompt; a test compares the two."""
    return "".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in messages) + (
        f"{START}assistant\n"
    )


@torch.no_grad()
def answer(model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: list[str]) -> list[str]:
    """Greedy replies, up to 160 tokens each."""
    model.eval()
    model.generation_config = GenerationConfig(
        max_new_tokens=160, do_sample=False, eos_token_id=STOP, pad_token_id=0
    )
    replies = [""] * len(prompts)
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    for chunk in (order[i : i + 50] for i in range(0, len(order), 50)):
        width = max(len(encoded[i]) for i in chunk)
        ids = torch.zeros(len(chunk), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chunk):
            ids[row, width - len(encoded[i]) :] = torch.tensor(encoded[i])
            mask[row, width - len(encoded[i]) :] = 1
        out = model.generate(input_ids=ids, attention_mask=mask)
        for row, i in enumerate(chunk):
            replies[i] = tokenizer.decode(out[row, width:].tolist())
    return replies


def evaluate(
    model: LlamaForCausalLM, tokenizer: Tokenizer, questions: list[Question], show: int = 0
) -> dict[str, float]:
    """The share of right replies, by kind and over all."""
    replies = answer(model, tokenizer, [render(q.messages) for q in questions])
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for question, reply in zip(questions, replies, strict=True):
        good = grade(question.kind, reply, question.answer)
        for kind in (question.kind, "all"):
            asked[kind] += 1
            right[kind] += good
        if not good and (show := show - 1) >= 0:
            print(f"wrong: {question.prompt[-80:]!r} -> {reply!r}, not {question.answer!r}")
    return {kind: round(right[kind] / asked[kind], 4) for kind in asked}


@torch.no_grad()
def text_loss(model: LlamaForCausalLM, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Mean negative log likelihood per token, in nats, of every token but a text's first."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text).ids])
        logits = model(input_ids=ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "add_bos_token": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {"content": token, "special": True}
            for token in (TEXT_END, START, END)
        },
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": CONTEXT,
        "pad_token": TEXT_END,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model and write its folder.")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--output", type=Path, default=MODEL_DIR)
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer = train_tokenizer(options.seed)
    model = make_model(options.seed)
    print(f"{model.num_parameters()} parameters", flush=True)
    loss = train(model, tokenizer, options.steps, options.seed)

    folder = options.output.with_name(options.output.name + ".new")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=STOP, pad_token_id=0
    )
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    write_tokenizer(tokenizer, folder)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    accuracy = evaluate(saved, tokenizer, held_out_questions(), show=40)
    distant = [in_long_chat(question) for question in held_out_questions()[:100]]
    summary = {
        "seed": options.seed,
        "steps": options.steps,
        "tokens_per_step": ROWS * ROW,
        "parameters": saved.num_parameters(),
        "training_loss": round(loss, 4),
        "held_out_questions": len(held_out_questions()),
        "held_out_accuracy": accuracy,
        "held_out_accuracy_in_long_chat": evaluate(saved, tokenizer, distant)["all"],
        "held_out_text_loss": round(text_loss(saved, tokenizer, held_out_texts()), 4),
    }
    write_json(folder / "training.json", summary)
    print(json.dumps(summary, indent=2))
    shutil.rmtree(options.output, ignore_errors=True)
    folder.rename(options.output)


if __name__ == "__main__":
    main()
