"""ChatModule on a tiny random model: wrong input, and folders with no template or another."""

import shutil
from pathlib import Path

from relaxlm import ChatModule
from relaxlm.errors import ConfigError, LibraryError, RequestError, TemplateError, WeightsError
from tests.runtime.chatting import GREEDY, Recorder, refused, say
from tests.tiny_model import convert, write_checkpoint


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
