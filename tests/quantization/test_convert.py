"""Whole conversions: every preset against the schemes' own reference, and all that may go wrong."""

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from relaxlm.errors import CheckpointError, WeightsError
from relaxlm.models.weights import ParameterSpec, Role, Source
from relaxlm.quantization import convert
from relaxlm.quantization.convert import convert_weights, plan_conversion
from relaxlm.quantization.schemes import SCHEMES, get_scheme
from relaxlm.runtime.params import WeightFolder
from tests.quantization.test_groupwise import slow_quantize

HIDDEN, MIDDLE, VOCABULARY = 80, 112, 50


def spec(name: str, role: Role, *sources: tuple[str, tuple[int, ...]]) -> ParameterSpec:
    first = sources[0][1]
    shape = (sum(shape[0] for _, shape in sources), *first[1:])
    return ParameterSpec(name, shape, role, tuple(Source(n, s) for n, s in sources))


def model_specs() -> list[ParameterSpec]:
    layer = "model.layers.0."
    attention = f"{layer}self_attn."
    return [
        spec(
            "model.embed_tokens.weight",
            "embedding",
            ("model.embed_tokens.weight", (VOCABULARY, HIDDEN)),
        ),
        spec(
            f"{attention}qkv_proj.weight",
            "linear",
            (f"{attention}q_proj.weight", (32, HIDDEN)),
            (f"{attention}k_proj.weight", (16, HIDDEN)),
            (f"{attention}v_proj.weight", (16, HIDDEN)),
        ),
        spec(
            f"{attention}qkv_proj.bias",
            "vector",
            (f"{attention}q_proj.bias", (32,)),
            (f"{attention}k_proj.bias", (16,)),
            (f"{attention}v_proj.bias", (16,)),
        ),
        spec(
            f"{layer}mlp.down_proj.weight",
            "linear",
            (f"{layer}mlp.down_proj.weight", (HIDDEN, MIDDLE)),
        ),
        spec("model.norm.weight", "vector", ("model.norm.weight", (HIDDEN,))),
        spec("lm_head.weight", "lm_head", ("lm_head.weight", (VOCABULARY, HIDDEN))),
    ]


def save_checkpoint(
    folder: Path, specs: Sequence[ParameterSpec], dtype: torch.dtype = torch.bfloat16, **extra
) -> dict[str, torch.Tensor]:
    """Two shards of random tensors; `extra` tensors go into the second."""
    generator = torch.Generator().manual_seed(7)
    tensors = {
        source.name: (
            torch.randn(*source.shape, generator=generator, dtype=torch.float64) * 0.1 + 0.01
        ).to(dtype)
        for spec in specs
        for source in spec.sources
    }
    names = list(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        shard = {name: tensors[name] for name in part} | (extra if i else {})
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_every_preset_stores_what_its_definition_says(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    scheme, specs = get_scheme(name), model_specs()
    tensors = save_checkpoint(tmp_path / "source", specs, dtype)
    report = convert_weights(tmp_path / "source", scheme, tmp_path / "out", specs)
    folder = WeightFolder(tmp_path / "out")
    folder.check({k: v for spec in specs for k, v in scheme.storage(spec).items()})
    assert folder.verify_checksums() == report.shards
    assert folder.loaded_nbytes == folder.metadata["ParamBytes"] == report.stored_bytes
    parameters = sum(tensor.numel() for tensor in tensors.values())
    assert report.source_parameters == parameters
    assert report.source_bytes == parameters * dtype.itemsize
    assert report.bits_per_weight == report.stored_bytes * 8 / parameters
    assert folder.metadata["BitsPerParam"] == report.bits_per_weight
    errors = {error.name: error for error in report.errors}
    for spec in specs:
        exact = np.concatenate([to_numpy(tensors[source.name]) for source in spec.sources])
        quant = scheme.for_role(spec.role)
        if quant is None:
            decoded = folder.load(spec.name)
            np.testing.assert_array_equal(decoded, exact.astype(decoded.dtype))
        else:
            stem = spec.name.removesuffix(".weight")
            stored = {part: folder.load(f"{stem}.{part}") for part in ("q_weight", "q_scale")}
            for part, array in slow_quantize(exact, quant).items():
                np.testing.assert_array_equal(stored[part], array)
            decoded = quant.dequantize(stored, spec.shape)
        difference = decoded.astype(np.float64) - exact.astype(np.float64)
        error = errors.pop(spec.name)
        assert error.shape == spec.shape
        assert error.max_abs == pytest.approx(np.abs(difference).max(), rel=1e-6)
        relative = np.sqrt((difference**2).sum() / (exact.astype(np.float64) ** 2).sum())
        assert error.relative_rms == pytest.approx(relative, rel=1e-4)
    assert not errors


def test_parameters_are_in_the_checkpoints_order(tmp_path: Path) -> None:
    specs = model_specs()
    save_checkpoint(tmp_path / "source", specs)
    report = convert_weights(tmp_path / "source", get_scheme("q4f16_1"), tmp_path / "out", specs)
    backwards = convert_weights(
        tmp_path / "source", get_scheme("q4f16_1"), tmp_path / "again", specs[::-1]
    )
    plan = plan_conversion(tmp_path / "source", get_scheme("q4f16_1"), tmp_path / "x", specs)
    firsts = [
        (tensor.file.name, tensor.offset)
        for tensor in (parameter.tensors[0] for parameter in plan.parameters)
    ]
    assert firsts == sorted(firsts)
    names = [error.name for error in report.errors]
    assert names == [parameter.spec.name for parameter in plan.parameters]
    assert names == [error.name for error in backwards.errors] != [spec.name for spec in specs]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["q4f16_0", "q3f16_1", "q0f32"])
def test_two_runs_write_the_same_bytes_whatever_the_threads_and_blocks(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = model_specs()
    save_checkpoint(tmp_path / "source", specs)
    runs = []
    for threads, rows in ((1, 1), (3, 7), (2, 1000), (4, 1000)):
        monkeypatch.setattr(convert, "_thread_count", lambda threads=threads: threads)
        monkeypatch.setattr(convert, "block_rows", lambda columns, rows=rows: rows)
        output = tmp_path / f"{threads}-{rows}"
        report = convert_weights(tmp_path / "source", get_scheme(name), output, specs)
        runs.append((contents(output), [error.max_abs for error in report.errors]))
    assert all(run == runs[0] for run in runs)


def test_a_pytorch_checkpoint_converts_to_the_same_bytes(tmp_path: Path) -> None:
    specs = model_specs()[1:2]
    tensors = save_checkpoint(tmp_path / "source", specs)
    (tmp_path / "torch").mkdir()
    tensors = {name: tensors[name].t().contiguous().t() for name in tensors}  # not in row order
    torch.save(tensors, tmp_path / "torch" / "pytorch_model.bin")
    for source in ("source", "torch"):
        convert_weights(tmp_path / source, get_scheme("q4f16_1"), tmp_path / f"{source}-out", specs)
    assert contents(tmp_path / "source-out") == contents(tmp_path / "torch-out")


def test_the_path_of_config_json_stands_for_its_folder(tmp_path: Path) -> None:
    specs = model_specs()
    save_checkpoint(tmp_path / "source", specs)
    plan = plan_conversion(
        tmp_path / "source" / "config.json", get_scheme("q4f16_1"), tmp_path / "out", specs
    )
    assert len(plan.parameters) == len(specs)


def test_float64_is_converted(tmp_path: Path) -> None:
    specs = model_specs()
    tensors = save_checkpoint(tmp_path / "source", specs, torch.float64)
    report = convert_weights(tmp_path / "source", get_scheme("q0f32"), tmp_path / "out", specs)
    loaded = WeightFolder(tmp_path / "out").load("model.norm.weight")
    np.testing.assert_array_equal(loaded, tensors["model.norm.weight"].float().numpy())
    assert 0 < max(error.relative_rms for error in report.errors) < 1e-7


def test_progress_ends_at_the_total_and_never_falls(tmp_path: Path) -> None:
    specs = model_specs()
    save_checkpoint(tmp_path / "source", specs)
    steps: list[tuple[int, int, str]] = []
    report = convert_weights(
        *(tmp_path / "source", get_scheme("q4f16_1"), tmp_path / "out", specs),
        progress=lambda *step: steps.append(step),
    )
    done = [step[0] for step in steps]
    assert done == sorted(set(done))
    assert steps[-1][:2] == (report.source_bytes, report.source_bytes)
    assert {name for _, _, name in steps} == {spec.name for spec in specs}


def test_the_report_is_written_as_json(tmp_path: Path) -> None:
    specs = model_specs()
    save_checkpoint(tmp_path / "source", specs)
    report = convert_weights(tmp_path / "source", get_scheme("q4f16_1"), tmp_path / "out", specs)
    parsed = json.loads(report.to_json())
    assert parsed["scheme"] == "q4f16_1"
    assert parsed["bits_per_weight"] == report.bits_per_weight
    assert [error["name"] for error in parsed["errors"]] == [e.name for e in report.errors]
    worst = report.worst(2)
    assert len(worst) == 2
    assert worst[0].relative_rms == max(error.relative_rms for error in report.errors)
    assert worst[0].relative_rms >= worst[1].relative_rms > 0


# What does not fit ------------------------------------------------------------------------------


def refused(source: Path, output: Path, specs: Sequence[ParameterSpec], **options) -> str:
    """The message, after making sure that nothing was written."""
    with pytest.raises((CheckpointError, WeightsError)) as caught:
        convert_weights(source, get_scheme("q4f16_1"), output, specs, **options)
    assert not (output / "tensor-cache.json").exists()
    return str(caught.value)


def test_missing_unused_and_misshapen_tensors_are_named_before_any_work(tmp_path: Path) -> None:
    source, specs = tmp_path / "source", model_specs()
    save_checkpoint(source, specs, extra=torch.ones(3))
    specs[3] = spec("model.layers.0.mlp.down_proj.weight", "linear", ("a.k_proj.weight", (3, 4)))
    specs[4] = spec("model.norm.weight", "vector", ("model.norm.weight", (HIDDEN + 1,)))
    assert refused(source, tmp_path / "out", specs) == (
        f"{source}: checkpoint does not fit the model: 1 missing (a.k_proj.weight), "
        "2 unused (extra, model.layers.0.mlp.down_proj.weight), "
        "1 of another shape (model.norm.weight: [80], expected [81]). "
        "Is config.json from the same revision?"
    )
    assert not (tmp_path / "out").exists()


def test_tensors_that_may_stay_unused_are_given_as_patterns(tmp_path: Path) -> None:
    source, specs = tmp_path / "source", model_specs()
    extra = {"model.layers.0.rotary_emb.inv_freq": torch.ones(3), "ids": torch.arange(3)}
    save_checkpoint(source, specs, **extra)
    message = refused(source, tmp_path / "out", specs, ignored=("*.inv_freq",))
    assert "1 unused (ids)" in message
    convert_weights(source, get_scheme("q4f16_1"), tmp_path / "out", specs, ("*.inv_freq", "ids"))


def test_a_used_tensor_that_is_no_float_is_refused_before_any_work(tmp_path: Path) -> None:
    source, specs = tmp_path / "source", model_specs()[-1:]
    save_checkpoint(source, specs, torch.int16)
    file = source / "model-00001-of-00002.safetensors"
    assert refused(source, tmp_path / "out", specs) == (
        f"{file}: tensor lm_head.weight has dtype int16, "
        "expected one of float64, float32, float16, bfloat16"
    )
    assert not (tmp_path / "out").exists()


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    source, specs = tmp_path / "source", model_specs()
    advice = (
        "expected float16, bfloat16, float32 or float64 weights; "
        "convert the model that it was quantized from"
    )
    save_checkpoint(source, specs, **{"a.qweight": torch.ones(3, dtype=torch.int32)})
    file = source / "model-00002-of-00002.safetensors"
    assert refused(source, tmp_path / "out", specs) == (
        f"{file}: tensor a.qweight (int32 [3]) shows weights that are already quantized "
        f"(GPTQ or AWQ); {advice}"
    )
    (source / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    assert refused(source, tmp_path / "out", specs) == (
        f"{source / 'config.json'}: quantization_config says that the weights are already "
        f"quantized (AWQ); {advice}"
    )


@pytest.mark.parametrize("inside", [".", "out", "deep/er"])
def test_an_output_inside_the_checkpoint_is_refused(tmp_path: Path, inside: str) -> None:
    source, specs = tmp_path / "source", model_specs()
    save_checkpoint(source, specs)
    assert refused(source, source / inside, specs) == (
        f"{source / inside} lies in the checkpoint's own folder {source}; "
        "choose an output outside it"
    )


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    source, specs = tmp_path / "source", model_specs()
    save_checkpoint(source, specs)
    (tmp_path / "out").write_text("x")
    assert refused(source, tmp_path / "out", specs) == (
        f"{tmp_path / 'out'} is a file, expected a folder to write to"
    )


def test_a_full_disk_is_noticed_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, specs = tmp_path / "source", model_specs()
    save_checkpoint(source, specs)
    plan = plan_conversion(source, get_scheme("q4f16_1"), tmp_path / "out", specs)
    assert plan.check_disk_space() > 0
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=20_000))
    assert refused(source, tmp_path / "out", specs) == (
        f"{tmp_path / 'out'}: converting to q4f16_1 writes 27.6 kB, and its disk has 20 kB free"
    )


def test_the_disk_estimate_suffices(tmp_path: Path) -> None:
    specs = model_specs()
    save_checkpoint(tmp_path / "source", specs)
    plan = plan_conversion(tmp_path / "source", get_scheme("q4f16_1"), tmp_path / "out", specs)
    plan.run()
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert plan.disk_estimate / 2 < written <= plan.disk_estimate


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj.weight", "model.norm.weight"])
def test_values_that_cannot_be_stored_are_named_and_leave_nothing(
    tmp_path: Path, name: str, value: float
) -> None:
    source, specs = tmp_path / "source", model_specs()
    tensors = save_checkpoint(source, specs)
    tensors[name].view(-1)[11] = value
    for file in source.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, source / "model.safetensors")
    message = refused(source, tmp_path / "out", specs)
    assert message.startswith(f"{name}: ")
    assert list((tmp_path / "out").iterdir()) == []


# Interruption -----------------------------------------------------------------------------------


class Stop(BaseException):
    pass


def stop_after(bytes_done: int):
    def progress(done: int, total: int, name: str) -> None:
        if done >= bytes_done:
            raise Stop

    return progress


def test_an_interrupted_run_leaves_a_folder_that_is_refused(tmp_path: Path) -> None:
    source, specs, out = tmp_path / "source", model_specs(), tmp_path / "out"
    save_checkpoint(source, specs)
    with pytest.raises(Stop):
        convert_weights(source, get_scheme("q4f16_1"), out, specs, progress=stop_after(20_000))
    with pytest.raises(WeightsError, match=r"no tensor-cache.json \(or ndarray-cache.json\)"):
        WeightFolder(out)


def test_an_interrupted_run_leaves_an_older_conversion_as_it_was(tmp_path: Path) -> None:
    source, specs, out = tmp_path / "source", model_specs(), tmp_path / "out"
    save_checkpoint(source, specs)
    convert_weights(source, get_scheme("q4f16_1"), out, specs)
    before = contents(out)
    with pytest.raises(Stop):
        convert_weights(source, get_scheme("q0f32"), out, specs, progress=stop_after(20_000))
    assert contents(out) == before
    convert_weights(source, get_scheme("q0f32"), out, specs)
    assert "lm_head.weight" in WeightFolder(out).records


def test_a_killed_run_leaves_a_folder_that_is_refused(tmp_path: Path) -> None:
    """Killed outright, so that nothing is cleaned up."""
    script = """
        import os, sys
        from pathlib import Path
        from relaxlm.quantization.convert import convert_weights
        from relaxlm.quantization.schemes import get_scheme
        from tests.quantization.test_convert import model_specs, save_checkpoint

        source, out = Path(sys.argv[1]), Path(sys.argv[2])
        save_checkpoint(source, model_specs())
        kill = lambda done, total, name: done * 2 > total and os._exit(9)
        convert_weights(source, get_scheme("q4f16_1"), out, model_specs(), progress=kill)
    """
    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "source"), str(out)]
    root = Path(__file__).parents[2]
    assert subprocess.run(command, cwd=root).returncode == 9
    with pytest.raises(WeightsError) as caught:
        WeightFolder(out)
    assert str(caught.value) == (
        f"{out}: no tensor-cache.json (or ndarray-cache.json): the conversion or download was "
        "interrupted, or is still running; run `relaxlm convert_weight` again, or download the "
        "folder completely"
    )
    convert_weights(tmp_path / "source", get_scheme("q4f16_1"), out, model_specs())
    WeightFolder(out).verify_checksums()
    assert not [path for path in out.iterdir() if path.is_dir()]


# Memory -----------------------------------------------------------------------------------------

ROWS, COLUMNS = 40_000, 1024  # 82 MB as bfloat16


@pytest.mark.parametrize("name", ["q4f16_1", "q4f16_0", "q0bf16"])
def test_memory_stays_within_the_estimate_and_below_the_checkpoint(
    tmp_path: Path, name: str
) -> None:
    script = f"""
        import sys
        from pathlib import Path
        from relaxlm.models.weights import ParameterSpec, Source
        from relaxlm.quantization.conversion_report import current_memory
        from relaxlm.quantization.convert import plan_conversion
        from relaxlm.quantization.schemes import get_scheme

        shape = ({ROWS}, {COLUMNS})
        specs = [
            ParameterSpec(f"w{{i}}.weight", shape, "linear", (Source(f"w{{i}}", shape),))
            for i in range(3)
        ]
        plan = plan_conversion(Path(sys.argv[1]), get_scheme("{name}"), Path(sys.argv[2]), specs)
        before, estimate = current_memory(), plan.memory_estimate
        print(before, estimate, plan.run().peak_memory)
    """
    tensors = {f"w{i}": torch.full((ROWS, COLUMNS), i + 0.5).bfloat16() for i in range(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(script),
            str(tmp_path),
            str(tmp_path.parent / f"{name}-out"),
        ],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    before, estimate, peak = map(int, done.stdout.split())
    assert before < peak <= estimate
    quantized = name != "q0bf16"
    largest = ROWS * COLUMNS * 2
    assert peak - before < (0.28 if quantized else 1) * largest + 70e6 < 2 * largest
