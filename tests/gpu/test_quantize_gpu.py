"""The run on a GPU: same seed same bytes, statistics as on the CPU, a perplexity near the CPU's."""

import json

import pytest
import torch
from tiny_runs import LAYERS, files_of, write_runnable, write_text

from convert.config import ModelConfig
from convert.errors import InputError
from engine.model.attention import causal_attend
from quant.learn.captured_steps import Steps
from quant.learn.training import repeatable, training_attend
from quant.state.end_to_end import PassWork
from quant.statistics.block import load_statistics
from quant.statistics.calibrate import block_file
from turbomind_quant.cli.evaluate import evaluate
from turbomind_quant.cli.quantize import quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
SETTINGS = ["--group-size", "32", "--samples", "8", "--seqlen", "64", "--kv-bits", "8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    write_runnable(folder / "model")
    write_text(folder / "text.txt")
    return folder


def call(group, *arguments):
    group.main([str(part) for part in arguments], standalone_mode=False)


def search(place, preset):
    """The arguments of a search on the GPU, without its output."""
    text = [] if preset == "rtn" else ["--calib-data", place / "text.txt"]
    return ["awq", place / "model", *text, *SETTINGS, "--preset", preset, "--device", DEVICE]


@pytest.mark.parametrize("preset", ["rtn", "gptq-r", "awq", "fast", "default", "best"])
def test_two_runs_of_one_seed_are_byte_identical(preset, place, tmp_path):
    base = search(place, preset)
    for name in ("one", "two"):
        call(quantize, *base, "-o", tmp_path / name)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_an_end_to_end_pass_that_was_stopped_goes_on_in_the_same_bytes(place, tmp_path, monkeypatch, capsys):
    """The steps are a captured graph, run a few at a time; the second run begins with what the first saved."""
    base = [*search(place, "fast"), "--distill", "-o"]
    call(quantize, *base, tmp_path / "whole")
    reached = PassWork.reached

    def stop_at_half(work, done, steps, kl, state):
        work._clock.is_due = lambda tensors: True
        reached(work, done, steps, kl, state)
        if done >= steps // 2:
            raise InputError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(PassWork, "reached", stop_at_half)
        with pytest.raises(BaseException, match="stopped"):
            call(quantize, *base, tmp_path / "stopped")
    capsys.readouterr()
    call(quantize, *base, tmp_path / "stopped")
    assert "going on with the end-to-end pass after step 300" in capsys.readouterr().err
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


def test_gradients_through_attention_repeat_at_full_lengths():
    """Of 8 samples of 512 tokens and 3 key heads for 9: there the backward pass as it comes sums in any order."""
    device = torch.device("cuda")
    config = ModelConfig("llama", "LlamaForCausalLM", 576, 1536, 1, 9, 3, 64, 64, 1e-5, 1e5, 8192)
    attend = training_attend(causal_attend(8, 512, config), device)
    generator = torch.Generator(device=device).manual_seed(0)
    q, k, v = (
        torch.randn(8 * 512, heads, 64, device=device, generator=generator).requires_grad_(True)
        for heads in (9, 3, 3)
    )
    weight = torch.randn(8 * 512, 9 * 64, device=device, generator=generator)
    with repeatable():
        runs = [torch.autograd.grad((attend(0, q, k, v) * weight).sum(), [q, k, v]) for _ in range(6)]
    for grads in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, runs[0], strict=True))


def test_statistics_are_those_of_the_cpu(place, tmp_path):
    base = [
        "calibrate",
        place / "model",
        "--calib-data",
        place / "text.txt",
        "--samples",
        "8",
        "--seqlen",
        "64",
    ]
    call(quantize, *base, "-o", tmp_path / "cpu", "--device", "cpu")
    call(quantize, *base, "-o", tmp_path / "cuda", "--device", "cuda", "--dtype", "float32")
    for layer in range(LAYERS):
        ours, theirs = (load_statistics(tmp_path / name / block_file(layer)) for name in ("cuda", "cpu"))
        for name, stats in theirs.inputs.items():
            # float32 products of the two devices, through up to four layers
            assert torch.allclose(
                ours.inputs[name].gram, stats.gram, rtol=1e-2, atol=1e-3 * float(stats.gram.abs().max())
            )


def test_a_model_quantized_on_the_gpu_judges_alike_on_both(place, tmp_path, capsys):
    base = search(place, "default")
    call(quantize, *base, "-o", tmp_path / "out")
    found = []
    for device in ("cpu", "cuda"):
        capsys.readouterr()
        call(
            evaluate,
            "ppl",
            tmp_path / "out",
            "--text",
            place / "text.txt",
            "--windows",
            "4",
            "--device",
            device,
            "--json",
        )
        found.append(json.loads(capsys.readouterr().out)["rows"][0]["ppl"])
    assert found[1] == pytest.approx(found[0], rel=0.02)  # float16 against float32


def test_self_written_text_on_the_gpu(place, tmp_path, monkeypatch):
    monkeypatch.setenv("TMQ_CACHE", str(tmp_path / "cache"))
    call(
        quantize,
        "awq",
        place / "model",
        "-o",
        tmp_path / "out",
        *SETTINGS,
        "--preset",
        "fast",
        "--device",
        DEVICE,
    )
    manifest = json.loads((tmp_path / "out" / "tmq" / "manifest.json").read_text())
    assert manifest["calibration"]["source"] == "generated"


def test_a_step_that_fails_while_it_is_captured_leaves_the_device_usable():
    device = torch.device("cuda")
    x = torch.zeros(8, device=device)

    def step():
        x.add_(1)
        if torch.cuda.is_current_stream_capturing():
            raise MemoryError("the step is too large")

    with pytest.raises(MemoryError, match="too large"):
        Steps(step, device).run(10)
    assert not torch.cuda.is_current_stream_capturing()

    def sound():
        x.add_(1)

    runner = Steps(sound, device)  # the next one runs, captured too
    before = float(x[0])
    runner.run(10)
    assert float(x[0]) == before + 10


def test_steps_of_one_block_after_another_keep_no_more_memory():
    """cuBLAS has a workspace for each stream that it is called in: with a new stream for each step they add up."""
    device = torch.device("cuda")
    x, y = torch.ones(2, 512, 512, device=device)

    def step():
        torch.mm(x, x, out=y)

    def held():
        Steps(step, device).run(6)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    first = held()
    assert [held() - first for _ in range(8)] == [0] * 8
