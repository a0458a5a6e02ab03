"""ChatModule on a tiny random model: conversations, the cache, limits, and wrong input."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relaxlm import ChatConfig, ChatModule, GenerationConfig, StreamIterator
from relaxlm.errors import (
    ConfigError,
    ContextOverflowError,
    LibraryError,
    RequestError,
    TemplateError,
    WeightsError,
)
from relaxlm.runtime.generation import SamplingState
from relaxlm.runtime.page_pool import PagePool
from relaxlm.runtime.sampling import sample
from relaxlm.runtime.sequence_table import PagedSequences
from relaxlm.runtime.streaming import StreamCallback
from tests.numpy_llama import llama_logits
from tests.tiny_model import CONFIG, TOKENS, TinyModel, compile_library, convert, write_checkpoint

# Digits are tokens that never merge: a reply of digits has the same tokens when it comes back in
# the next prompt.
GREEDY = {"temperature": 0.0, "max_tokens": 12}


class Recorder(StreamCallback):
    def __init__(self, on_text: Callable[[str], None] = lambda text: None) -> None:
        super().__init__(callback_interval=1)
        self.pieces: list[str] = []
        self.ends: list[BaseException | None] = []
        self.on_text = on_text

    def text(self, delta: str) -> None:
        self.pieces.append(delta)
        self.on_text(delta)

    def ended(self, error: BaseException | None) -> None:
        self.ends.append(error)


@pytest.fixture(scope="module")
def load(tiny: TinyModel) -> Callable[..., ChatModule]:
    def make(folder: Path = tiny.folder, library: Path = tiny.library, **options) -> ChatModule:
        return ChatModule(folder, "cpu", model_lib=library, **options)

    return make


@pytest.fixture(scope="module")
def loaded(load) -> ChatModule:
    return load()


@pytest.fixture
def chat(loaded: ChatModule) -> ChatModule:
    loaded.reset_chat()
    return loaded


@pytest.fixture
def digits(chat: ChatModule) -> dict[str, Any]:
    """Greedy settings that allow only digits."""
    return {**GREEDY, "logit_bias": {chat.tokenizer.token_to_id(d): 100.0 for d in "0123456789"}}


def free_pages(chat: ChatModule) -> int:
    chat.sequences.check()
    return chat.sequences.pool.free


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def scripted(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
    """Make the model say this."""
    from relaxlm.runtime.sampling import Sampled

    left = iter(tokens)
    monkeypatch.setattr(
        "relaxlm.runtime.generator.sample",
        lambda logits, states: [Sampled(next(left), None, ()) for _ in states],
    )


# Conversations


def test_a_reply_is_that_of_the_reference(chat, tiny):
    chat.generate("hello", GREEDY)
    ids = chat.prompts.encode([say("user", "hello")])
    for token in chat.replies[0].tokens:
        logits = llama_logits(tiny.weights, CONFIG, ids)[-1]
        assert token == int(logits[:TOKENS].argmax())
        ids.append(token)


def test_later_turns_reuse_the_cache_and_say_what_a_fresh_module_says(chat, load, digits):
    fresh, held = load(), 0
    for question in ("hello world", "the cat?", "answer!"):
        reply = chat.generate(question, digits)
        fresh.reset_chat()
        assert fresh.generate(chat.messages[:-1], digits) == reply
        assert chat.replies[0].tokens == fresh.replies[0].tokens
        assert fresh.timings.reused_tokens == 0
        assert chat.timings.reused_tokens == held
        # All of this turn but the last token, which has not been run.
        held = chat.timings.prompt_tokens + len(chat.replies[0].tokens) - 1
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 3


def test_a_prompt_that_differs_in_the_middle_reuses_what_comes_before(chat, load, digits):
    chat.generate([say("system", "the cat sat on the mat"), say("user", "hello")], digits)
    messages = [say("system", "the cat sat on the mat"), say("user", "no, another")]
    reply = chat.generate(messages, digits)
    shared = len(chat.prompts.encode(messages[:1], add_generation_prompt=False))
    assert shared <= chat.timings.reused_tokens < chat.timings.prompt_tokens - 3
    assert reply == load().generate(messages, digits)


def test_the_same_prompt_again_runs_its_last_token_only(chat):
    first = chat.generate("hello", GREEDY, stateless=True)
    assert chat.generate("hello", GREEDY, stateless=True) == first
    assert chat.timings.reused_tokens == chat.timings.prompt_tokens - 1


def test_stateless_leaves_the_conversation_as_it_is(chat, load, digits):
    chat.generate("hello", digits)
    before = list(chat.messages)
    other = chat.generate("the dog ran", digits, stateless=True)
    assert chat.messages == before
    assert other == load().generate("the dog ran", digits)
    expected = load().generate([*before, say("user", "and?")], digits)
    assert chat.generate("and?", digits) == expected


def test_a_list_of_messages_takes_the_place_of_the_conversation(chat):
    chat.generate("hello", GREEDY)
    messages = [say("system", "answer"), say("user", "a"), say("assistant", "b"), say("user", "c")]
    reply = chat.generate(messages, GREEDY)
    assert chat.messages == [*messages, say("assistant", reply)]


def test_reset_forgets_messages_and_pages(chat):
    chat.generate("hello", GREEDY)
    assert free_pages(chat) < chat.sequences.pool.total
    chat.reset_chat()
    assert (chat.messages, free_pages(chat)) == ([], chat.sequences.pool.total)


def test_several_replies_equal_separate_choices(chat, tiny):
    config = GenerationConfig(n=3, seed=11, max_tokens=10)
    texts = chat.generate("hello", config)
    assert texts == [reply.text for reply in chat.replies]
    assert chat.messages[-1] == say("assistant", texts[0])
    prompt = chat.prompts.encode([say("user", "hello")])
    for choice, reply in enumerate(chat.replies):
        ids, state = list(prompt), SamplingState(config, prompt, TOKENS, choice)
        while len(ids) < len(prompt) + len(reply.tokens):
            logits = llama_logits(tiny.weights, CONFIG, ids)[-1:].astype(np.float32)
            ids.append(sample(logits, [state])[0].token)
        assert reply.tokens == ids[len(prompt) :]
    chat.sequences.check()
    chat.reset_chat()
    assert free_pages(chat) == chat.sequences.pool.total


def test_as_many_replies_as_possible_fit_into_a_full_context(chat):
    settings = {"n": chat.max_replies, "ignore_eos": True, "seed": 1}
    chat.generate("hello world, " * 9, settings)
    room = (chat.context_window_size - chat.timings.prompt_tokens) // chat.max_replies
    assert [len(reply.tokens) for reply in chat.replies] == [room] * chat.max_replies
    chat.sequences.check()


def test_there_are_pages_for_as_many_replies_as_possible_to_any_prompt(chat):
    for prompt in range(1, 256):
        for n in (1, 2, 3, 6, 11, chat.max_replies):
            sequences = PagedSequences(PagePool(chat.executor.pages), 16)
            seqs = [sequences.add()]
            sequences.append(seqs[0], prompt)
            seqs += [sequences.fork(seqs[0]) for _ in range(n - 1)]
            # The last token of a reply is not run. Steps of 1 take the same pages as one step.
            for steps in (1, (256 - prompt) // n - 2):
                if steps > 0:
                    sequences.batch([(seq, steps) for seq in seqs])
                    sequences.take_copies()


def test_a_seed_makes_a_reply_reproducible(chat):
    one, two, other = (
        chat.generate("hello", {"seed": seed, "max_tokens": 20}, stateless=True)
        for seed in (1, 1, 2)
    )
    assert one == two != other


# Text


@pytest.mark.parametrize("seed", range(8))
def test_streamed_text_is_the_returned_text_in_whole_characters(chat, seed):
    recorder = Recorder()
    settings = {"seed": seed, "temperature": 3.0, "max_tokens": 80, "ignore_eos": True}
    text = chat.generate("hello", settings, recorder)
    assert "".join(recorder.pieces) == text
    assert recorder.ends == [None]
    assert text == chat.tokenizer.decode(chat.replies[0].tokens)[: len(text)]
    for piece in recorder.pieces:
        piece.encode()  # no surrogates


def test_stop_strings_end_a_reply_and_are_never_streamed(chat, monkeypatch):
    ids = chat.tokenizer.encode("größer 🙂 ST and STOP. More")
    scripted(monkeypatch, ids)
    recorder = Recorder()
    text = chat.generate("hello", {"stop": ["STOP.", "never"]}, recorder)
    assert text == "größer 🙂 ST and "
    assert "".join(recorder.pieces) == text
    assert chat.replies[0].finish_reason == "stop"
    assert chat.messages[-1]["content"] == text


def test_the_end_token_ends_a_reply_unless_ignored(chat, monkeypatch):
    ids = [*chat.tokenizer.encode("one"), chat.tokenizer.eos_id, *chat.tokenizer.encode("two")]
    scripted(monkeypatch, ids)
    assert chat.generate("hello", stateless=True) == "one"
    assert chat.replies[0].finish_reason == "stop"
    scripted(monkeypatch, ids)
    settings = {"ignore_eos": True, "max_tokens": len(ids)}
    assert chat.generate("hello", settings, stateless=True) == "onetwo"
    assert chat.replies[0].finish_reason == "length"


@pytest.mark.parametrize("name", ["max_tokens", "max_gen_len"])
def test_max_tokens(chat, name):
    chat.generate("hello", {name: 7, "ignore_eos": True})
    assert len(chat.replies[0].tokens) == 7
    assert chat.replies[0].finish_reason == "length"


def test_settings_come_from_the_call_then_chat_config_then_the_folder(load, tiny, tmp_path):
    folder = shutil.copytree(tiny.folder, tmp_path / "folder")
    file = folder / "mlc-chat-config.json"
    content = file.read_text().replace('"temperature": 1.0', '"temperature": 0.25')
    file.write_text(content.replace('"top_p": 1.0', '"top_p": 0.5'))
    chat = load(folder, chat_config={"top_p": 0.75, "max_gen_len": 33})
    settings = chat.settings({"frequency_penalty": 1.5})
    assert settings.temperature == 0.25
    assert settings.top_p == 0.75
    assert settings.max_tokens == 33
    assert settings.frequency_penalty == 1.5
    assert chat.settings({"max_tokens": 5}).max_tokens == 5


# Streaming from another thread, cancelling, and callbacks that fail


def in_thread(chat: ChatModule, *arguments, **options) -> tuple[threading.Thread, list]:
    """Generate in a thread; errors go to a list."""
    errors: list[BaseException] = []

    def generate() -> None:
        try:
            chat.generate(*arguments, **options)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    return thread, errors


def test_a_stream_iterator_gets_the_reply_of_a_thread(chat):
    expected = chat.generate("hello", GREEDY, stateless=True)
    stream = StreamIterator(callback_interval=2)
    thread, errors = in_thread(chat, "hello", GREEDY, progress_callback=stream)
    assert "".join(stream) == expected
    thread.join()
    assert not errors


@pytest.mark.parametrize(
    ("prompt", "settings", "error"),
    [("hello", {"temperature": -1}, RequestError), ("hello " * 300, {}, ContextOverflowError)],
)
def test_a_stream_iterator_raises_the_error_of_a_thread(chat, prompt, settings, error):
    stream = StreamIterator()
    thread, errors = in_thread(chat, prompt, settings, progress_callback=stream)
    with pytest.raises(error):
        list(stream)
    thread.join()
    assert [type(e) for e in errors] == [error]


def test_a_cancelled_reply_stays_in_the_conversation(chat, load, digits):
    recorder = Recorder(lambda text: recorder.cancel() if len(recorder.pieces) == 4 else None)
    text = chat.generate("hello", {**digits, "max_tokens": 40}, recorder)
    assert len(text) == len(chat.replies[0].tokens) == 4
    assert chat.replies[0].finish_reason == "cancelled"
    assert chat.messages == [say("user", "hello"), say("assistant", text)]
    held = chat.timings.prompt_tokens + 3
    expected = load().generate([*chat.messages, say("user", "and?")], digits)
    assert chat.generate("and?", digits, recorder) == expected  # not cancelled again
    assert chat.timings.reused_tokens == held


def test_a_reply_cancelled_before_its_first_token_was_never_asked_for(chat, digits):
    chat.generate("hello", digits)
    before = list(chat.messages)
    recorder = Recorder()
    recorder.cancel()
    assert chat.generate("and?", digits, recorder) == ""
    assert (chat.messages, recorder.ends) == (before, [None])
    chat.sequences.check()
    assert chat.generate("and?", digits) != ""


def test_an_error_in_a_callback_is_raised_and_the_module_goes_on(chat, load, digits):
    chat.generate("hello", digits)
    before = list(chat.messages)

    def fail(text: str) -> None:
        raise ZeroDivisionError("mine")

    recorder = Recorder(fail)
    with pytest.raises(ZeroDivisionError, match="mine"):
        chat.generate("and?", digits, recorder)
    assert [type(end) for end in recorder.ends] == [ZeroDivisionError]
    assert chat.messages == before
    assert free_pages(chat) == chat.sequences.pool.total
    expected = load().generate([*before, say("user", "and?")], digits)
    assert chat.generate("and?", digits) == expected


def test_the_first_error_is_raised_when_a_callback_fails_twice(chat):
    class Broken(Recorder):
        def ended(self, error: BaseException | None) -> None:
            raise OSError("ended")

    def fail(text: str) -> None:
        raise ZeroDivisionError("text")

    with pytest.raises(ZeroDivisionError, match="text"):
        chat.generate("hello", GREEDY, Broken(fail))
    assert free_pages(chat) == chat.sequences.pool.total


# The context window


def test_a_full_context_forgets_the_oldest_turns(chat, digits):
    system = say("system", "the cat")
    chat.messages = [system]
    forgotten = []
    for turn in range(8):
        chat.generate(f"question {turn} hello world", digits)
        forgotten.append(chat.forgotten_messages)
        assert chat.messages[0] == system
        assert chat.messages[-2] == say("user", f"question {turn} hello world")
        assert len(chat.prompts.encode(chat.messages)) < 256
    assert forgotten[0] == 0
    assert set(forgotten) == {0, 2}  # whole turns
    # What is left is as if it had been all there ever was.
    assert [m["role"] for m in chat.messages] == [
        "system",
        *["user", "assistant"] * ((len(chat.messages) - 1) // 2),
    ]
    chat.sequences.check()


def test_the_other_policy_is_an_error_and_keeps_the_conversation(load, digits):
    chat = load(chat_config=ChatConfig(context_overflow="error"))
    with pytest.raises(ContextOverflowError) as raised:
        for turn in range(20):
            before = list(chat.messages)
            chat.generate(f"question {turn} hello world", digits)
    tokens = len(chat.prompts.encode([*before, say("user", f"question {turn} hello world")]))
    assert tokens >= 256
    assert str(raised.value) == (
        f"the prompt has {tokens} tokens, the context window 256: shorten the prompt, or compile "
        'with a larger --overrides "context_window_size=..." if the model allows it'
    )
    assert chat.messages == before
    assert chat.forgotten_messages == 0


def test_one_message_that_is_too_long_is_an_error_under_either_policy(chat):
    chat.generate("hello", GREEDY)
    before = list(chat.messages)
    with pytest.raises(ContextOverflowError, match=r"^the prompt has \d+ tokens, the context"):
        chat.generate("hello " * 300, GREEDY)
    assert chat.messages == before
    chat.generate("hello", GREEDY)


def test_a_reply_ends_where_the_context_does(chat):
    chat.generate("hello world " * 12, {"ignore_eos": True, "seed": 3})
    tokens = chat.timings.prompt_tokens + len(chat.replies[0].tokens)
    assert tokens == chat.context_window_size == 256
    assert chat.replies[0].finish_reason == "length"


def test_a_smaller_context_than_the_librarys(load):
    chat = load(chat_config={"context_window_size": 100})
    assert chat.executor.pages < load().executor.pages
    chat.generate("hello", {"ignore_eos": True, "seed": 3})
    assert chat.timings.prompt_tokens + len(chat.replies[0].tokens) == 100


def test_a_sliding_window_goes_on_for_ever_in_constant_space(tiny, load, tmp_path, digits):
    window, sinks = 40, 4
    library = compile_library(
        tiny.folder,
        tmp_path / "window.so",
        f"sliding_window_size={window};attention_sink_size={sinks};context_window_size=64;"
        "prefill_chunk_size=32",
    )
    chat = load(library=library)
    chat.generate("hello world " * 15, {**digits, "max_tokens": 300, "ignore_eos": True})
    tokens = [*chat.prompts.encode(chat.messages[:1]), *chat.replies[0].tokens]
    assert len(tokens) > 400
    logits = llama_logits(tiny.weights, CONFIG, tokens, window, sinks)
    allowed = list(digits["logit_bias"])
    expected = [allowed[i] for i in logits[:, allowed].argmax(-1)]
    assert tokens[-300:] == expected[-301:-1]
    assert chat.sequences.pool.used <= 1 + 40 // 16 + 2
    with pytest.raises(RequestError) as raised:
        chat.generate("a", {"n": 2})
    assert str(raised.value) == (
        "n = 2: at most 1 at a time with a sliding window; ask several times"
    )
    held = len(tokens) - 1
    reply = chat.generate("and?", digits)
    assert chat.timings.reused_tokens == held
    assert reply == load(library=library).generate(chat.messages[:-1], digits)
    # Much of the first message has left the cache: it is computed again.
    chat.generate(chat.messages[:1], digits)
    assert chat.timings.reused_tokens == 0
    chat.sequences.check()


# Benchmarks and embeddings


def test_benchmark_generates_exactly_so_many_tokens_and_reuses_nothing(chat, digits):
    chat.generate("hello", digits)
    before = list(chat.messages)
    for _ in range(2):
        text = chat.benchmark_generate("hello world", 50)
        assert len(chat.replies[0].tokens) == 50
        assert chat.timings.reused_tokens == 0
        assert text == chat.replies[0].text
    assert chat.messages == before
    assert "tok/s" in chat.stats()


def test_a_benchmark_that_does_not_fit_is_refused(chat):
    with pytest.raises(ContextOverflowError) as raised:
        chat.benchmark_generate("hello", 256)
    assert str(raised.value) == (
        "a prompt of 3 tokens and 256 more do not fit into the context window of 256: ask for at "
        "most 253"
    )


def test_embed_text_gives_the_rows_of_the_embedding(chat, tiny):
    text = "the cat sat 🙂 " * 40  # longer than one step
    ids = chat.tokenizer.encode(text)
    vectors = chat.embed_text(text)
    assert vectors.shape == (len(ids), 64) and len(ids) > 256
    np.testing.assert_array_equal(vectors, tiny.weights["model.embed_tokens.weight"][ids])
    with pytest.raises(RequestError) as raised:
        chat.embed_text("")
    assert str(raised.value) == "embed_text: the text has no tokens, expected at least one"


def test_stats_count_and_time(chat, digits):
    chat.generate("hello", digits)
    chat.generate("and?", digits)
    t = chat.timings
    assert chat.stats().startswith("prefill: ")
    lines = chat.stats(verbose=True).splitlines()
    assert lines[1] == (
        f"prompt: {t.prompt_tokens} tokens, {t.reused_tokens} of them from the cache; "
        "reply: 12 tokens"
    )
    assert lines[2].startswith("memory: 411 kB parameters, up to ")
    assert "(float32)" in lines[2]


def test_stats_before_any_reply(load):
    assert load().stats() == "prefill: -, decode: -"


# Libraries that are compiled on first use


def test_settings_of_the_library_take_effect_on_first_use(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("RELAXLM_CACHE", str(tmp_path))
    stages: list[str] = []

    def chat() -> ChatModule:
        return ChatModule(
            tiny.folder,
            "cpu",
            {"context_window_size": 64, "kv_cache_dtype": "fp8"},
            progress=lambda stage, share: stages.append(stage),
        )

    first = chat()
    compiled = list(stages)
    assert compiled and chat().library.path == first.library.path
    assert stages == compiled
    assert first.context_window_size == 64
    assert first.library.metadata.kv_cache.dtype == "float8_e4m3"
    assert "(float8_e4m3)" in first.stats(verbose=True)
    assert len(first.generate("hello", {"max_tokens": 5, "ignore_eos": True})) > 0


# Wrong input


def refused(error: type[Exception], act: Callable[[], Any]) -> str:
    with pytest.raises(error) as raised:
        act()
    assert type(raised.value) is error
    return str(raised.value)


def test_wrong_requests_are_refused_and_change_nothing(chat):
    chat.generate("hello", GREEDY)
    before = list(chat.messages)
    for prompt, settings, message in (
        (
            "a",
            {"temprature": 1},
            "'temprature' is not a generation option: did you mean 'temperature'?",
        ),
        ("a", {"n": 17}, "n = 17: at most 16 at a time with this library; ask several times"),
        ([], {}, "the conversation has no messages"),
        (7, {}, "the prompt is a int, expected a text or a list of messages"),
        (["a"], {}, "message 0 is 'a': expected an object with role and content"),
        (
            "a",
            {"logit_bias": {310: 1}},
            "logit_bias has token id 310: expected 0 to 299, the vocabulary of this model",
        ),
    ):
        assert refused(RequestError, lambda p=prompt, s=settings: chat.generate(p, s)) == message
    assert refused(RequestError, lambda: chat.generate("a", {"n": 2}, Recorder())) == (
        "n = 2 replies cannot be streamed to one progress_callback: ask for n = 1, or leave the "
        "callback out"
    )
    assert refused(TemplateError, lambda: chat.generate([say("critic", "a")])) == (
        f"{chat.folder}: chat template 'default': line 1: refuses this conversation: no role critic"
    )
    assert chat.messages == before


def test_libraries_that_do_not_fit(tiny, load, tmp_path):
    folder = convert(tiny.source, tmp_path / "tiny-q4f32_1", "q4f32_1")
    assert refused(LibraryError, lambda: load(folder)) == (
        f"{tiny.library} was compiled for quantization = 'q0f32', but {folder} has 'q4f32_1'; "
        f"compile for this folder: relaxlm compile {folder} -o LIB"
    )
    assert (
        refused(ConfigError, lambda: ChatModule(tiny.folder, "cuda", model_lib=tiny.library))
        == f"device 'cuda', but {tiny.library} was compiled for cpu"
    )
    assert refused(ConfigError, lambda: load(opt="act_quant=0")) == (
        f"opt = 'act_quant=0' is for compiling, and {tiny.library} is compiled already: leave one "
        'of them out, or compile again with --opt "act_quant=0"'
    )
    assert refused(ConfigError, lambda: load(chat_config={"prefill_chunk_size": 9})) == (
        f"chat_config: prefill_chunk_size = 9, but {tiny.library} was compiled with 256; compile "
        'it again with --overrides "prefill_chunk_size=9", or leave the setting out'
    )
    assert refused(ConfigError, lambda: load(model_lib_path="other.so")) == (
        f"model_lib = {str(tiny.library)!r} and model_lib_path = 'other.so' are two names of one "
        "argument: give one of them"
    )


def test_model_lib_path_is_the_same_as_model_lib(tiny):
    chat = ChatModule(tiny.folder, model_lib_path=tiny.library)
    assert chat.library.path == tiny.library


def test_folders_that_are_incomplete(tiny, load, tmp_path):
    def broken(name: str) -> Path:
        return Path(shutil.copytree(tiny.folder, tmp_path / name))

    assert refused(ConfigError, lambda: load(tmp_path / "nowhere")).startswith(
        f"{tmp_path / 'nowhere' / 'mlc-chat-config.json'}: no such file."
    )
    folder = broken("missing")
    (shard,) = folder.glob("params_shard_*.bin")
    shard.unlink()
    assert refused(WeightsError, lambda: load(folder)) == (
        f"{shard} is missing, and tensor-cache.json names it; convert or download the weights again"
    )
    folder = broken("short")
    shard = folder / shard.name
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 1)
    assert refused(WeightsError, lambda: load(folder)) == (
        f"{shard}: {size - 1} bytes, expected {size} as tensor-cache.json says; convert or "
        "download the weights again"
    )


def test_a_folder_without_template_takes_single_texts(tiny, load, tmp_path, digits):
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "plain"))
    chat = load(folder)
    plain = {
        "conv_template": None,
        "relaxlm": chat.model.config.relaxlm.model_copy(update={"chat_template": None}),
    }
    chat.model.config.model_copy(update=plain).save(folder)
    chat = load(folder)
    reply = chat.generate("the cat", digits)
    assert chat.generate("the cat", digits) == reply  # nothing is remembered
    assert chat.timings.prompt_tokens == len(chat.tokenizer.encode("the cat"))
    assert refused(
        RequestError, lambda: chat.generate([say("user", "a"), say("assistant", "b")])
    ) == (
        f"{folder} has no chat template, so it takes one text at a time and no conversation; "
        "`relaxlm gen_config --conv-template NAME` sets a template"
    )


def test_a_named_template_takes_the_place_of_the_folders(load, tiny):
    chat = load(chat_config={"conv_template": "LM"})
    assert chat.prompts.encode([say("user", "the cat")]) == chat.tokenizer.encode("the cat")
    message = refused(ConfigError, lambda: load(chat_config={"conv_template": "nothing"}))
    assert message.startswith("conversation template 'nothing' is not known. Known are: chatml, ")


def test_a_reply_that_continues_a_text_keeps_its_first_space(tiny, tmp_path, load):
    # SentencePiece drops the space in front of a text; a reply to "Once" is no new text.
    import json

    source = write_checkpoint(tmp_path / "source", tiny.weights, template=None)
    description = json.loads((source / "tokenizer.json").read_text())
    pieces = {f"<0x{i:02X}>": i for i in range(256)} | {"▁": 256, "▁cat": 257, "a": 258}
    description["model"].update(vocab=pieces, merges=[], byte_fallback=True)
    description["added_tokens"] = []
    description["normalizer"] = {"type": "Prepend", "prepend": "▁"}
    description["pre_tokenizer"] = None
    description["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    (source / "tokenizer.json").write_text(json.dumps(description))
    (source / "tokenizer_config.json").write_text("{}")
    chat = load(convert(source, tmp_path / "folder"))
    cat = {"logit_bias": {257: 100.0}, "temperature": 0.0, "max_tokens": 2}
    assert chat.generate("a", cat) == " cat cat"
    chat = load(chat.folder, chat_config={"conv_template": "chatml"})
    assert chat.generate("a", cat) == "cat cat"
