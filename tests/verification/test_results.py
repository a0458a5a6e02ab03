"""Verdicts, and how they are put into words."""

import json
import math
from pathlib import Path

import pytest

from relaxlm.errors import VerificationError
from relaxlm.quantization.kv_cache import KV_FORMATS
from relaxlm.quantization.schemes import SCHEMES
from relaxlm.verification.kept_weights import WeightDifference
from relaxlm.verification.limits import Limits, damage_limits, exact_limits
from relaxlm.verification.metrics import LogitDistance
from relaxlm.verification.report import report
from relaxlm.verification.results import Comparison, PromptResult, Verification

GOOD = LogitDistance(
    rows=10,
    values=1000,
    targets=9,
    max_error=2e-6,
    error_sum=1e-4,
    deviation_squares=4000.0,  # a standard deviation of 2
    kl_sum=1e-11,
    kl_max=1e-11,
    agreeing=10,
    nll_reference_sum=27.0,
    nll_library_sum=27.0,
)


def comparison(
    reference="float", limits=None, layers=(0.0, 1e-6, 2e-6), text="A text", **changed
) -> Comparison:
    logits = LogitDistance(**{**vars(GOOD), **changed})
    limits = limits or Limits(1e-3, 1e-6, 0.9, 1e-5)
    return Comparison(reference, (PromptResult(text, 10, logits, tuple(layers)),), limits)


def verification(*comparisons: Comparison, weights=(), settings=(), preset="q4f16_1"):
    return Verification(
        Path("original"),
        Path("model.so"),
        Path("converted"),
        preset,
        "cpu",
        "float16",
        comparisons,
        tuple(weights),
        tuple(settings),
    )


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        (
            {"max_error": 0.5},
            "the largest error of a logit is 0.25 standard deviations of the logits, allowed are "
            "0.001",
        ),
        ({"kl_sum": 20.0}, "the mean KL is 2 nats, allowed are 1e-06"),
        ({"agreeing": 8}, "top-1 agreement is 80.0 %, required are 90.0 %"),
        ({"kl_sum": math.inf}, "the mean KL is inf nats, allowed are 1e-06"),
    ],
)
def test_a_limit_that_does_not_hold_is_named(changed: dict, fault: str) -> None:
    found = comparison(layers=(0.0, 1e-6, 0.5), **changed)
    assert found.exceeded() == [fault]
    with pytest.raises(VerificationError) as raised:
        verification(found).check()
    assert str(raised.value) == (
        f"model.so does not pass. Against the checkpoint in float32 {fault}. First diverging: "
        "layer 1 (relative error 5.0e-01, expected at most 3.0e-05)."
    )


def test_a_share_of_the_tokens_may_have_seen_other_experts() -> None:
    """Errors of 10 tokens; the deviation is 2."""
    limits = Limits(1e-3, None, None, rerouted=0.1)
    one = {"row_errors": (1e-3,) * 9 + (0.5,), "max_error": 0.5}
    two = {"row_errors": (1e-3,) * 8 + (0.4, 0.5), "max_error": 0.5}
    assert comparison(limits=limits, **one).exceeded() == []
    assert comparison(limits=limits, **one).rerouted == 1
    assert comparison(limits=limits, **two).exceeded() == [
        "the largest error of a logit (without 10 % of the tokens) is 0.2 standard deviations of "
        "the logits, allowed are 0.001"
    ]
    assert comparison(limits=Limits(1e-3, None, None), **one).exceeded() != []


def test_what_is_within_the_limits_passes() -> None:
    found = verification(comparison(), comparison("dequantized"))
    found.check()
    assert found.failure() == ""
    assert found.as_json()["passed"] is True


def test_not_a_number_is_not_within_any_limit() -> None:
    assert len(comparison(kl_sum=math.nan, deviation_squares=math.nan).exceeded()) == 2
    assert comparison(layers=(0.0, math.nan, 0.0)).first_diverging == 1


def test_several_faults_of_both_references_are_one_message() -> None:
    floats = comparison("float", Limits(None, 0.1, 0.9), kl_sum=5.0, agreeing=3)
    stored = comparison("dequantized", layers=(0.3, 0.4, 0.5), max_error=1.0)
    weights = [WeightDifference(name, 1.0, 0.1, False) for name in "abcd"]
    found = verification(floats, stored, weights=weights, settings=["eps: 1 in the library, 2"])
    assert found.failure() == (
        "Against the checkpoint in float32 the mean KL is 0.5 nats, allowed are 0.1. "
        "Against the checkpoint in float32 top-1 agreement is 30.0 %, required are 90.0 %. "
        "Against the values that the library stores the largest error of a logit is 0.5 standard "
        "deviations of the logits, allowed are 0.001. First diverging: embedding (relative error "
        "3.0e-01, expected at most 1.0e-05). 4 of the parameters in converted are not what q4f16_1 "
        "makes of original: a, b, c and more. Library and checkpoint differ in "
        "eps: 1 in the library, 2."
    )


def test_a_preset_that_costs_too_much_is_told_from_a_wrong_library() -> None:
    floats = comparison("float", Limits(None, 0.1, None), kl_sum=5.0)
    assert verification(floats, comparison("dequantized")).failure() == (
        "Against the checkpoint in float32 the mean KL is 0.5 nats, allowed are 0.1. It computes "
        "exactly what it stores: q4f16_1 with a float16 cache costs this model as much. Try a "
        "preset with more bits."
    )


def test_wrong_weights_fail_however_small_the_error() -> None:
    wrong = WeightDifference("model.norm.weight", 0.5, 1e-6, False)
    rounded = WeightDifference("lm_head.weight", 0.001, 1e-3, True)
    found = verification(comparison(), weights=[rounded, wrong])
    assert found.failure() == (
        "1 of the parameters in converted is not what q4f16_1 makes of original: model.norm.weight."
    )
    assert verification(comparison(), weights=[rounded]).failure() == ""


def test_the_file_has_every_number_and_no_infinity() -> None:
    found = verification(comparison(max_error=math.inf, layers=(0.0, math.inf, 1e-6)))
    content = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert content["failure"] == found.failure()
    (part,) = content["comparisons"]
    assert part["total"]["max_error"] is None and part["total"]["spread"] == 2
    assert part["first_diverging"] == "layer 0"
    assert part["layers"][2] == {
        "after": "layer 1",
        "relative_error": 1e-6,
        "expected": pytest.approx(3e-5),
    }
    limits = {"max_error": 1e-3, "kl": 1e-6, "top1": 0.9, "layer": 1e-5}
    assert part["limits"] == {**limits, "cosine": None, "rerouted": 0.0}


def test_a_report_has_80_columns() -> None:
    wrong = WeightDifference("model.layers.10.self_attn.qkv_proj.weight", 1.0, 0.1, False)
    found = verification(
        comparison("float", Limits(None, 0.1, 0.9), text="größer\tals\nzwölf " * 9, rows=10**5),
        comparison("dequantized", max_error=1e4, nll_reference_sum=5e3, layers=[0.0, *[0.5] * 120]),
        weights=[wrong] * 30,
    )
    lines = report(found)
    assert max(map(len, lines)) <= 80
    assert "    and 20 more" in lines
    assert "gr??er als..." in "\n".join(lines)


def test_a_report() -> None:
    assert report(verification(comparison(layers=(0.0, 1e-6, 0.5)), preset="q0f32")) == [
        "weights: exactly what q0f32 makes of the checkpoint",
        "",
        "against the checkpoint in float32:",
        "              tokens  max err mean err  KL mean   KL max   top-1    NLL NLL lib",
        "A text            10  2.0e-06  1.0e-07  1.0e-12  1.0e-11  100.0%  3.000   3.000",
        "all               10  2.0e-06  1.0e-07  1.0e-12  1.0e-11  100.0%  3.000   3.000",
        "largest error: 1.0e-06 standard deviations of the logits (2)",
        "limits: largest error 1.0e-03 deviations, KL mean 1.0e-06, top-1 90.0%: kept",
        "",
        "relative error of a token's vector (the worst token):",
        "after               vs float  expected below",
        "embedding            0.0e+00         1.0e-05",
        "layer 0              1.0e-06         2.0e-05",
        "layer 1              5.0e-01         3.0e-05  <- first",
    ]


# Limits


def test_every_preset_and_cache_has_limits() -> None:
    for scheme in SCHEMES.values():
        for cache in KV_FORMATS:
            for activations in ("float32", "float16", "bfloat16", "rounded"):
                exact = exact_limits(activations, cache)
                assert exact.max_error and exact.kl and exact.layer and exact.top1 is None
                damage = damage_limits(scheme, activations, cache)
                assert damage.kl is not None and damage.top1 is not None
                assert damage.max_error is None and damage.expected_layers(3) is None


def test_fewer_bits_may_cost_more() -> None:
    order = ("q0f32", "q0f16", "q0bf16", "q8f16_1", "q4f16_1", "q3f16_1")
    kl = [damage_limits(SCHEMES[name], "float32", "float32").kl for name in order]
    assert kl == sorted(kl) and kl[0] == 0
    top1 = [damage_limits(SCHEMES[name], "float32", "float32").top1 for name in order]
    assert top1 == sorted(top1, reverse=True)
    plain = exact_limits("float32", "float32")
    for rounded in (exact_limits("float16", "float32"), exact_limits("float32", "float8_e4m3")):
        assert rounded.max_error > plain.max_error and rounded.layer > plain.layer


def test_layers_may_be_less_exact_the_later_they_come() -> None:
    assert Limits(None, None, None, 1e-3).expected_layers(2) == pytest.approx([1e-3, 2e-3, 3e-3])


def test_given_limits_take_the_place_of_the_defaults() -> None:
    limits = Limits(1.0, 2.0, 0.5, 3.0)
    assert limits.changed(kl=0.0) == Limits(1.0, 0.0, 0.5, 3.0)
    assert limits.changed(max_error=4.0, top1=0.0) == Limits(4.0, 2.0, 0.0, 3.0)
