import pytest

from relaxlm.errors import ConfigError
from relaxlm.runtime.chat_settings import ChatConfig


def test_settings_go_to_the_sampler_or_to_the_compiler():
    config = ChatConfig(temperature=0.5, max_gen_len=9, context_window_size=64, max_batch_size=2)
    assert config.sampling() == {"temperature": 0.5, "max_gen_len": 9}
    assert config.compiled() == {"context_window_size": 64, "max_batch_size": 2}
    assert config.overrides() == "context_window_size=64;max_batch_size=2"


def test_nothing_given_changes_nothing():
    assert (ChatConfig().sampling(), ChatConfig().overrides()) == ({}, "")
    assert ChatConfig.of(None) == ChatConfig.of({}) == ChatConfig()


def test_short_names_of_cache_formats_are_those_of_the_library():
    assert ChatConfig.of({"kv_cache_dtype": "fp8"}).compiled() == {"kv_cache_dtype": "float8_e4m3"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temprature": 1}, "chat_config: unknown: temprature"),
        (
            {"temperature": -1.0},
            "chat_config: temperature = -1.0 is not possible: expected a number, 0 (greedy) or "
            "more",
        ),
        (
            {"max_gen_len": 0},
            "chat_config: max_gen_len = 0 is not possible: expected a whole number, 1 or more",
        ),
        (
            {"context_window_size": 0},
            "chat_config: context_window_size = 0: Input should be greater than 0",
        ),
        (
            {"context_overflow": "ignore"},
            "chat_config: context_overflow = 'ignore': Input should be 'drop_oldest_turns' or "
            "'error'",
        ),
        (
            {"kv_cache_dtype": "int3"},
            "kv_cache_dtype = 'int3' is not a KV-cache format. Known: float32, float16, bfloat16, "
            "float8_e4m3 (short: f32, f16, bf16, fp8)",
        ),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError) as raised:
        ChatConfig(**settings)
    assert str(raised.value) == message
