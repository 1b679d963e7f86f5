"""The front door: what `import turbomind_quant` offers, how light it is, and what type checkers see of it."""

import importlib
import inspect
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import is_dataclass
from pathlib import Path
from types import FunctionType

import pytest
from tiny_runs import write_runnable

import turbomind_quant as tmq
from turbomind_quant import _HOMES

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("kernels", "convert", "calib_data", "engine", "quant", "serve", "turbomind_quant")
FUNCTIONS = ["calibrate", "compare", "estimate", "inspect", "pack", "perplexity", "quantize", "report", "table", "throughput", "unpack", "verify"]  # fmt: skip


def python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_name_is_there_and_documented() -> None:
    for name in tmq.__all__:
        value = getattr(tmq, name)
        assert value.__doc__, name
        assert name in dir(tmq)
    assert set(FUNCTIONS) <= {name for name in tmq.__all__ if isinstance(getattr(tmq, name), FunctionType)}
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        tmq.quantise  # noqa: B018


def test_lazy_names_are_those_that_type_checkers_see() -> None:
    """The imports under TYPE_CHECKING and the table of homes say the same."""
    source = Path(tmq.__file__).read_text()
    seen = re.findall(
        r"^    from ([\w.]+) import \(?([\w\s,]+?)\)?$", source.split("if TYPE_CHECKING:")[1], re.M
    )
    stated = {home: {name.strip() for name in names.split(",") if name.strip()} for home, names in seen}
    assert stated == {home: set(names) for home, names in _HOMES.items()}
    errors = {"InputError", "InterruptedRunError", "ResourceError", "TmqError", "UsageError"}
    assert set(tmq.__all__) == errors.union(*stated.values())


def test_the_import_is_light() -> None:
    code = "import sys, turbomind_quant; print(*({'torch', 'numpy', 'click', 'rich', 'transformers'} & set(sys.modules)))"
    assert python(code) == ""


def test_no_function_of_the_library_imports_click_or_rich() -> None:
    code = f"import sys, importlib; [importlib.import_module(n) for n in {list(_HOMES)!r}]; print(*({{'click', 'rich'}} & set(sys.modules)))"
    assert python(code) == ""


USE = """
import sys
import turbomind_quant as tmq
model, out = sys.argv[1:]
tmq.quantize(model, out, group_size=32, samples=4, seqlen=32, device="cpu")
tmq.perplexity(model, out, windows=1, seqlen=32, device="cpu")
tmq.throughput(out, batch=[1], input_len=4, output_len=4, device="cpu")
with tmq.LLM(out, device="cpu", instance_num=1) as llm:
    llm.chat("x", max_tokens=2)
print(*({'click', 'rich', 'fastapi', 'starlette', 'prompt_toolkit'} & set(sys.modules)))
"""


def test_the_library_at_work_imports_neither_a_terminal_nor_a_server(tmp_path: Path) -> None:
    assert python(USE, str(write_runnable(tmp_path / "model")), str(tmp_path / "out")) == ""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_are_keyword_only_typed_and_results_frozen(name: str) -> None:
    function = getattr(tmq, name)
    signature = inspect.signature(function)
    positional = {
        key
        for key, parameter in signature.parameters.items()
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    }
    assert positional <= {"model", "out", "path", "paths", "runs", "workspace", "a", "b"}
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())
    result = signature.return_annotation
    if name != "report":  # which gives the path of the page
        assert is_dataclass(result) and result.__dataclass_params__.frozen and callable(result.to_json)


def test_options_are_named_and_defaulted_as_the_flags_are() -> None:
    from turbomind_quant.cli.evaluate import evaluate
    from turbomind_quant.cli.quantize import quantize

    pairs = {
        "calibrate": quantize.commands["calibrate"],
        "quantize": quantize.commands["awq"],
        "pack": quantize.commands["pack"],
        "unpack": quantize.commands["unpack"],
        "verify": quantize.commands["verify"],
        "inspect": quantize.commands["inspect"],
        "perplexity": evaluate.commands["ppl"],
        "table": evaluate.commands["table"],
        "compare": evaluate.commands["compare"],
        "throughput": evaluate.commands["throughput"],
        "report": evaluate.commands["report"],
    }
    for name, command in pairs.items():
        flags = {option.name for option in command.params} - {"as_json", "dry_run", "debug"}
        options = set(inspect.signature(getattr(tmq, name)).parameters) - {"progress"}
        # A folder to write is OUT for the library and -o/--output for the command.
        assert flags - {"output"} == options - {"out", "output"}, name
    assert tmq.quantize.__kwdefaults__["group_size"] == 128  # type: ignore[attr-defined]


def test_every_import_home_exists() -> None:
    for home, names in _HOMES.items():
        assert all(hasattr(importlib.import_module(home), name) for name in names)


def test_errors_are_ours_and_have_codes() -> None:
    kinds = (tmq.UsageError, tmq.InputError, tmq.ResourceError, tmq.InterruptedRunError)
    assert all(issubclass(kind, tmq.TmqError) for kind in kinds)
    assert [kind.exit_code for kind in kinds] == [2, 3, 4, 5]


PROGRAM = """
import turbomind_quant as tmq


def show(event: tmq.ProgressEvent) -> None:
    print(event.stage, event.done, event.total)


made: tmq.QuantizeResult = tmq.quantize("my-model", "my-model-4bit", preset="fast", group_size=64, progress=show)
print(made.bits_per_weight, made.layers[0]["role"], made.to_json())
plan = tmq.estimate("my-model", "my-model-4bit").plan
print(plan.peak_bytes)
report = tmq.perplexity("my-model", "my-model-4bit", windows=4)
print(report.rows[1].result.ppl, report.rows[1].against)
print(tmq.verify("my-model-4bit", source="my-model").passed)
print(tmq.inspect("my-model-4bit").family, tmq.pack("my-model-4bit", "workspace", tp=2).files)
with tmq.LLM("my-model-4bit", device="cpu") as llm:
    one: tmq.Answer = llm.generate("Once", max_tokens=8)
    several: list[tmq.Answer] = llm.generate(["Once", "Twice"], temperature=0.0)
    for piece in llm.stream([{"role": "user", "content": "Hello"}]):
        print(piece.upper())
try:
    tmq.throughput("my-model-4bit", batch=[1, 8], kv_bits=[16, 8])
except tmq.ResourceError as error:
    print(error.exit_code)
"""
WRONG = """
import turbomind_quant as tmq

tmq.quantize("my-model", "my-model-4bit", bits="four")
tmq.pack("my-model-4bit", "workspace", dialect="0.7")
tmq.LLM("my-model-4bit").chat("Hello", max_tokens="many")
"""


def test_mypy_strict_passes_a_right_program_and_finds_what_is_wrong_in_another(tmp_path: Path) -> None:
    """One run over both and the examples; the packages are found as installed ones are, their own code is not looked at again."""
    (tmp_path / "right.py").write_text(PROGRAM)
    (tmp_path / "wrong.py").write_text(WRONG)
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = True\nfollow_imports = silent\n")
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "right.py", "wrong.py"]
    command += [str(path) for path in sorted((ROOT / "examples").glob("*.py"))]
    paths = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, env=paths)
    lines = [line.partition(": ")[0] for line in done.stdout.splitlines() if " error: " in line]
    assert lines == ["wrong.py:4", "wrong.py:5", "wrong.py:6"], done.stdout


def test_the_wheel_is_marked_as_typed(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w"]
    subprocess.run([*command, str(tmp_path), str(tmp_path / "source")], check=True, timeout=300)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        names = archive.namelist()
    assert {f"{name}/py.typed" for name in PACKAGES} <= set(names)
    modules = {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert modules <= set(names)
