"""Group E of the fault table: devices that are absent, too old, full, or lost. On the CPU, with the faults injected."""

import logging
import os

import pytest
import torch
from tiny_runs import FAST, files_of, run, write_runnable, write_text

import engine.gpu_checks as gpu_checks
import engine.loading as loading
import quant.walk as walk_module
from convert.errors import ResourceError
from convert.readers import open_checkpoint
from engine.config import EngineConfig
from engine.gpu_checks import check_gpu, use_writable_cache
from kernels.int4 import quantize
from kernels.w4a16.layout import prepare
from kernels.w4a16.product import w4a16_linear
from quant.statistics.chunks import ChunkMemory, chunk_samples
from turbomind_quant.cli.commands import describe

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("devices")
    write_runnable(folder / "model", layers=3)
    write_text(folder / "text.txt")
    return folder


def line(place, out, *flags):
    return [
        "awq",
        place / "model",
        "-o",
        out,
        "--calib-data",
        place / "text.txt",
        "--preset",
        "fast",
        *FAST,
        *flags,
    ]


@pytest.mark.parametrize("case", ["E47-no-gpu"])
def test_a_gpu_that_is_not_there(case, place, tmp_path):
    done = run("quantize", *line(place, tmp_path / "out"), "--device", "cuda", prepare=hide_gpus(None))
    assert done.returncode == 2 and "shows 0 CUDA devices" in done.stderr and "--device cpu" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("visible", "device"), [("", "cuda"), ("99", "cuda:1")], ids=["E52-none-visible", "E52-out-of-range"]
)
def test_visible_devices_are_named(visible, device, place, tmp_path):
    done = run("quantize", *line(place, tmp_path / "out"), "--device", device, prepare=hide_gpus(visible))
    assert done.returncode == 2 and f"CUDA_VISIBLE_DEVICES='{visible}'" in done.stderr


def hide_gpus(visible):
    def prepare():
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        torch.cuda.is_available = lambda: False

    return prepare


@pytest.mark.parametrize("case", ["E47-old-capability", "E47-no-triton", "E47-fit"])
def test_a_gpu_that_cannot_run_the_kernels(case, monkeypatch, tmp_path):
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (7, 5) if "old" in case else (9, 0)
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if "triton" in case:
        monkeypatch.setattr(gpu_checks.importlib.util, "find_spec", lambda name: None)
    if case == "E47-fit":
        check_gpu(CUDA)
        return
    wanted = (
        r"Old Card.*capability 7\.5.*8\.0.*--device cpu"
        if "old" in case
        else "triton is not installed.*--device cpu"
    )
    with pytest.raises(ResourceError, match=wanted):
        check_gpu(CUDA)


@pytest.mark.parametrize("case", ["E47-no-triton-on-a-cpu"])
def test_the_cpu_path_needs_no_triton(case, place, tmp_path):
    """A process in which triton cannot be imported quantizes and judges all the same."""
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Absent())
from turbomind_quant.cli.evaluate import evaluate
from turbomind_quant.cli.quantize import quantize
try:
    quantize.main({[str(part) for part in line(place, tmp_path / "out")]!r})
except SystemExit as leaving:
    assert leaving.code == 0, leaving.code
evaluate.main(["ppl", {str(tmp_path / "out")!r}, "--text", {str(place / "text.txt")!r}, "--seqlen", "64", "--windows", "1"])
"""
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "tmq" / "manifest.json").is_file()


@pytest.mark.parametrize("case", ["E53-cache-folder"])
def test_a_kernel_cache_that_cannot_be_written(case, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        used = use_writable_cache()
    assert os.environ["TRITON_CACHE_DIR"] == str(used) and used.is_dir()
    assert "TRITON_CACHE_DIR" in caplog.text and str(tmp_path) in caplog.text
    used.rmdir()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "new"))
    assert use_writable_cache() == tmp_path / "new"


@pytest.mark.parametrize("case", ["E53-compile-failure", "E48-anywhere", "E51-anywhere"])
def test_errors_of_devices_are_told_in_words(case):
    errors = pytest.importorskip("triton.runtime.errors")
    error, wanted = {
        "E53-compile-failure": (
            errors.OutOfResources(300000, 232448, "shared memory"),
            "could not be compiled",
        ),
        "E48-anywhere": (torch.OutOfMemoryError("CUDA out of memory."), "memory is used up"),
        "E51-anywhere": (torch.AcceleratorError("an illegal memory access"), "does not recover"),
    }[case]
    code, text = describe(error)
    assert code == 4 and wanted in text


def failing(error, times=10**9, layer=0):
    """In the child, the search of blocks from `layer` on raises this error `times` times."""

    def prepare():
        real, left = walk_module.quantize_block, [times]

        def quantize_block(weights, *arguments, **options):
            if weights.index >= layer and left[0] > 0:
                left[0] -= 1
                raise error
            return real(weights, *arguments, **options)

        walk_module.quantize_block = quantize_block

    return prepare


@pytest.fixture(scope="module")
def quiet(place):
    done = run("quantize", *line(place, place / "quiet"))
    assert done.returncode == 0, done.stderr
    return files_of(place / "quiet")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("injected"), "ran out of memory with the smallest chunk"),
        (torch.OutOfMemoryError("another process"), "Free the GPU"),
        (torch.AcceleratorError("injected: uncorrectable ECC error"), "does not recover"),
    ],
    ids=["E48-search", "E49-midway", "E51-device-lost"],
)
def test_a_device_that_fails_midway_stops_the_run_resumable(error, words, place, quiet, tmp_path):
    done = run("quantize", *line(place, tmp_path / "out"), prepare=failing(error, layer=1))
    assert done.returncode == 4 and words in done.stderr and "layer 1" in done.stderr
    assert not (tmp_path / "out" / "tmq" / "manifest.json").exists()
    # the block that was done, and what lies outside the blocks
    shards = {path.name for path in (tmp_path / "out").glob("model-*.safetensors")}
    assert shards == {"model-00001-of-00004.safetensors", "model-00004-of-00004.safetensors"}
    again = run("quantize", *line(place, tmp_path / "out"))
    assert again.returncode == 0, again.stderr
    assert files_of(tmp_path / "out") == quiet


@pytest.mark.parametrize("case", ["E48-smaller-chunks"])
def test_smaller_chunks_are_tried_first(case, place, tmp_path):
    once = failing(torch.OutOfMemoryError("injected"), times=1, layer=1)
    done = run("quantize", *line(place, tmp_path / "out"), prepare=once)
    assert done.returncode == 0, done.stderr
    assert "layer 1: memory ran out with 64 samples at a time" in done.stderr


@pytest.mark.parametrize("case", ["E48-forward"])
def test_chunks_are_halved_until_they_fit(case):
    memory, sizes = ChunkMemory(torch.device("cpu"), 256), []

    def step():
        sizes.append(chunk_samples(256, "cpu"))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("injected")
        return "done"

    assert memory.run(step, "layer 3")[0] == "done" and sizes == [8, 4, 2]
    assert memory.run(step, "layer 4") == ("done", "") and sizes[-1] == 2  # it stays so
    assert chunk_samples(256, "cpu") == 8


@pytest.mark.parametrize("case", ["E48-load"])
def test_a_model_that_does_not_fit_says_by_how_much(case, place, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(loading.Model, "from_checkpoint", full)
    with pytest.raises(ResourceError, match=r"does not fit on cpu: .* GiB are taken.*int4"):
        loading.make_core(open_checkpoint(place / "model"), EngineConfig(device="cpu"))


@pytest.mark.parametrize("case", ["E54-columns", "E54-strided", "E54-dtype", "E54-empty"])
def test_kernel_wrappers_check_what_they_assume(case):
    weight = prepare(quantize(torch.randn(64, 256), 4, 128))
    x = torch.randn(3, 256).half()
    if case == "E54-empty":
        assert w4a16_linear(x[:0], weight).shape == (0, 64)
    elif case == "E54-strided":
        strided = x.repeat_interleave(2, 1)[:, ::2]
        assert not strided.is_contiguous() and torch.equal(
            w4a16_linear(strided, weight), w4a16_linear(x, weight)
        )
    else:
        broken, wanted = {
            "E54-columns": (x[:, :192].contiguous(), "x has 192 features, the weight takes K = 256"),
            "E54-dtype": (x.double(), "x is torch.float64"),
        }[case]
        with pytest.raises(ValueError, match=wanted):
            w4a16_linear(broken, weight)
