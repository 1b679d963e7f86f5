"""Group G of the fault table, packed shards: every damage is named, and none of it is read as a model."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_model
from tiny_runs import run

from convert.awq.writer import AwqWriter
from convert.checkpoint import BlockWeights, LinearWeights
from convert.config import QuantFormat
from convert.errors import InputError, TmqError
from convert.folder.output import OutputFolder
from convert.readers import open_checkpoint
from convert.turbomind.writer import write_workspace
from convert.verify import verify_path
from kernels.int4 import quantize

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "vocab_size": 64,
}
WEIGHTS = "triton_models/weights"
WO = f"{WEIGHTS}/layers.0.attention.wo.0.qweight"


def write_awq(folder: Path, kv: bool = False) -> Path:
    """A one-block AWQ checkpoint with head_dim 128, rounded to nearest."""
    generator = torch.Generator().manual_seed(1)

    def draw(rows: int, cols: int) -> torch.Tensor:
        return (torch.randn(rows, cols, generator=generator) * 0.05).half()

    p = "model.layers.0."
    names = [f"self_attn.{role}_proj" for role in "qkvo"] + [
        f"mlp.{part}_proj" for part in ("gate", "up", "down")
    ]
    tensors = {f"{p}{name}.weight": draw(512, 512) for name in names}
    tensors |= {f"{p}{name}_layernorm.weight": torch.ones(512).half() for name in ("input", "post_attention")}
    tensors |= {"model.embed_tokens.weight": draw(64, 512), "lm_head.weight": draw(64, 512)}
    tensors["model.norm.weight"] = torch.ones(512).half()
    source = folder.with_name(folder.name + "-float")
    write_model(source, tensors=tensors, **SIZES)
    ckpt = open_checkpoint(source)
    with OutputFolder.begin(folder, {}) as out:
        writer = AwqWriter(out, ckpt, QuantFormat(4, 128))
        block = ckpt.block(0)
        linears = {}
        for role, linear in block.linears.items():
            assert isinstance(linear.weight, torch.Tensor)
            linears[role] = LinearWeights(quantize(linear.weight, 4, 128))
        writer.write_block(0, BlockWeights(0, linears, block.norms))
        writer.finish_files()
        if kv:
            parts = {f"layers.0.{one}.{part}": torch.ones(4) for one in "kv" for part in ("scale", "zero")}
            save_file(parts, source / "kv.safetensors")
            out.copy(source / "kv.safetensors", "tmq/kv_params.safetensors")
        out.finish({"kind": "awq", "bits": 4})
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the checkpoint `awq` and its workspaces `new` (0.6.5, tp 2) and `old` (0.1)."""
    place = tmp_path_factory.mktemp("packed")
    source = open_checkpoint(write_awq(place / "awq", kv=True))
    write_workspace(source, place / "new", tp=2)
    write_workspace(source, place / "old", dialect="0.1")
    return place


@pytest.fixture
def workspace(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed / "new", tmp_path / "ws"))


@pytest.fixture
def old(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed / "old", tmp_path / "ws"))


def foreign(folder: Path) -> Path:
    """As another program leaves it: without run.json and manifest."""
    for name in ("run.json", "manifest.json", "report.json"):
        (folder / name).unlink(missing_ok=True)
    return folder


def flip(path: Path, place: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    assert len(first) == len(second) and first != second
    one.write_bytes(second)
    other.write_bytes(first)


def failures(path: Path, source: Path | None = None) -> str:
    report = verify_path(path, source)
    assert not report.passed
    return " ".join(check.detail for check in report.checks if not check.passed)


SHARD_DAMAGE: dict[str, Callable[[Path], object]] = {
    "G66-shorter": lambda ws: os.truncate(ws / WO, (ws / WO).stat().st_size - 4),
    "G66-longer": lambda ws: (ws / WO).write_bytes((ws / WO).read_bytes() + b"\0" * 4),
    "G66-empty": lambda ws: (ws / WO).write_bytes(b""),
    "G66-absent": lambda ws: (ws / WO).unlink(),
    "G66-swapped": lambda ws: swap(ws / WO, ws / WO.replace("wo.0", "wo.1")),
    "G66-flipped-bit": lambda ws: flip(ws / WO),
}


@pytest.mark.parametrize("case", SHARD_DAMAGE)
def test_damaged_shard(case: str, workspace: Path) -> None:
    SHARD_DAMAGE[case](workspace)
    assert re.search(r"layers\.0\.attention\.wo\.[01]\.qweight", failures(workspace))
    if case not in ("G66-swapped", "G66-flipped-bit"):  # the size alone tells: opening refuses
        with pytest.raises(InputError, match=r"wo\.0\.qweight"):
            open_checkpoint(workspace)


@pytest.mark.parametrize("case", ["G66-foreign-swapped", "G66-foreign-rows"])
def test_without_digests_the_source_tells(case: str, workspace: Path, packed: Path) -> None:
    foreign(workspace)
    assert verify_path(workspace, packed / "awq").passed
    if case == "G66-foreign-swapped":
        swap(workspace / WO, workspace / WO.replace("wo.0", "wo.1"))
    else:
        words = bytearray((workspace / WO).read_bytes())
        (workspace / WO).write_bytes(words[4:] + words[:4])
    assert "0.o" in failures(workspace, packed / "awq")


@pytest.mark.parametrize("case", ["G66-permissions"])
def test_permissions_lost(case: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, *args: Any, **options: Any) -> Any:
        if Path(path).name == Path(WO).name:
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **options)

    ckpt = open_checkpoint(workspace)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(TmqError, match=r"wo\.0\.qweight"):
        ckpt.block(0)


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


MANIFEST_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "G67-missing": (lambda ws: (ws / "manifest.json").unlink(), "unfinished"),
    "G67-edited": (lambda ws: edit_manifest(ws, lambda d: d.update(tp=4)), "manifest"),
    "G67-version": (lambda ws: edit_manifest(ws, lambda d: d.update(format=99)), "manifest"),
    "G67-dots": (lambda ws: edit_manifest(ws, lambda d: d["files"][0].update(path="../x")), "manifest"),
    "G67-absolute": (
        lambda ws: edit_manifest(ws, lambda d: d["files"][0].update(path="/etc/passwd")),
        "manifest",
    ),
    "G67-not-json": (lambda ws: (ws / "manifest.json").write_bytes(b"{"), "manifest"),
}


@pytest.mark.parametrize("case", MANIFEST_DAMAGE)
def test_damaged_manifest(case: str, workspace: Path) -> None:
    damage, word = MANIFEST_DAMAGE[case]
    damage(workspace)
    assert word in failures(workspace)
    with pytest.raises(InputError):
        open_checkpoint(workspace)


def rewrite(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert re.search(old, text, re.M)
        return re.sub(old, new, text, count=1, flags=re.M)

    return change


INI_DAMAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "G68-ini-key-missing": (rewrite(r"^head_num.*\n", ""), "head_num"),
    "G68-ini-wrong-type": (rewrite(r"^num_layer = .*$", "num_layer = two"), "num_layer"),
    "G68-ini-negative": (rewrite(r"^vocab_size = .*$", "vocab_size = -5"), "vocab_size"),
    "G68-ini-tp": (rewrite(r"^tensor_para_size = .*$", "tensor_para_size = 2"), "weight files do not fit"),
    "G68-ini-tp-zero": (rewrite(r"^tensor_para_size = .*$", "tensor_para_size = 0"), "tensor_para_size"),
    "G68-ini-section-twice": (lambda text: text + text, "damaged"),
    "G68-ini-interpolation": (rewrite(r"^num_layer = .*$", "num_layer = %(x)s"), "num_layer"),
    "G68-ini-no-section": (rewrite(r"^\[llama\]", "[other]"), "llama"),
    "G68-ini-not-text": (lambda text: "\0\x01", "config.ini"),
    "G69-ini-group": (rewrite(r"^group_size = .*$", "group_size = 64"), "group"),
    "G69-ini-bits": (rewrite(r"^weight_type = .*$", "weight_type = fp16"), "weight files do not fit"),
}
YAML_DAMAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "G68-yaml-key-missing": (rewrite(r"^  head_num.*\n", ""), "head_num"),
    "G68-yaml-wrong-type": (rewrite(r"^  num_layer: .*$", "  num_layer: two"), "num_layer"),
    "G68-yaml-boolean": (rewrite(r"^  num_layer: .*$", "  num_layer: true"), "num_layer"),
    "G68-yaml-tp": (rewrite(r"^  tp: .*$", "  tp: 4"), "weight files do not fit"),
    "G68-yaml-tp-zero": (rewrite(r"^  tp: .*$", "  tp: 0"), "tp"),
    "G68-yaml-layers-differ": (
        rewrite(r"^  inter_size:\n  - 512", "  inter_size:\n  - 512\n  - 640"),
        "inter_size",
    ),
    "G68-yaml-no-layers": (rewrite(r"^  inter_size:\n  - 512", "  inter_size: []"), "inter_size"),
    "G68-yaml-not-yaml": (lambda text: "{", "YAML"),
    "G68-yaml-other": (lambda text: "[1, 2]", "model_config"),
    "G68-yaml-arch": (rewrite(r"^  model_arch: .*$", "  model_arch: Other"), "model_arch"),
    "G69-yaml-group": (rewrite(r"^  group_size: .*$", "  group_size: 64"), "group"),
    "G69-yaml-bits": (rewrite(r"^  weight_type: .*$", "  weight_type: float16"), "weight files do not fit"),
    "G72-yaml-dtype": (rewrite(r"^  weight_type: .*$", "  weight_type: float8"), "weight_type"),
}


@pytest.mark.parametrize("case", [*INI_DAMAGE, *YAML_DAMAGE])
def test_damaged_configuration(case: str, packed: Path, tmp_path: Path) -> None:
    """Also without a manifest, whose digest would tell first."""
    damage, word = (INI_DAMAGE | YAML_DAMAGE)[case]
    kind, name = ("old", "config.ini") if case in INI_DAMAGE else ("new", "config.yaml")
    folder = foreign(Path(shutil.copytree(packed / kind, tmp_path / "ws")))
    path = folder / WEIGHTS / name
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError, match=word):
        open_checkpoint(folder)


KV_DAMAGE: dict[str, Callable[[Path], object]] = {
    "G70-rank-missing": lambda path: path.unlink(),
    "G70-two-floats": lambda path: path.write_bytes(path.read_bytes()[:8]),
    "G70-not-finite": lambda path: path.write_bytes(
        torch.tensor([1.0, 0, float("nan"), 0]).numpy().tobytes()
    ),
    "G70-no-scale": lambda path: path.write_bytes(torch.tensor([0.0, 0, 1, 0]).numpy().tobytes()),
}


@pytest.mark.parametrize("case", KV_DAMAGE)
def test_damaged_kv_file(case: str, old: Path) -> None:
    foreign(old)
    assert "quant_policy = 4" in (old / WEIGHTS / "config.ini").read_text()
    KV_DAMAGE[case](old / WEIGHTS / "layers.0.past_kv_scale.0.weight")
    assert "past_kv_scale" in failures(old)


@pytest.mark.parametrize("case", ["G70-layer-missing", "G70-count", "G70-infinite"])
def test_damaged_kv_parameters_of_the_checkpoint(case: str, packed: Path, tmp_path: Path) -> None:
    folder = foreign(Path(shutil.copytree(packed / "awq", tmp_path / "awq")))
    (folder / "tmq/run.json").unlink()
    (folder / "tmq/manifest.json").unlink()
    path = folder / "tmq/kv_params.safetensors"
    tensors = load_file(path)
    if case == "G70-layer-missing":
        del tensors["layers.0.k.scale"]
    elif case == "G70-count":
        tensors["layers.0.k.scale"] = torch.ones(3)
    else:
        tensors["layers.0.k.scale"] = torch.full((4,), float("inf"))
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"layers\.0\.k\.scale"):
        write_workspace(open_checkpoint(folder), tmp_path / "ws", dialect="0.1")


@pytest.mark.parametrize(
    ("case", "tp"),
    [("G71-heads", 8), ("G71-three", 3), ("G71-zero", 0)],
    ids=["G71-heads", "G71-three", "G71-zero"],
)
def test_legal_tp_is_listed(case: str, tp: int, packed: Path, tmp_path: Path) -> None:
    done = run("quantize", "pack", packed / "awq", "-o", tmp_path / "ws", "--tp", tp)
    assert done.returncode == (2 if tp == 0 else 3) and "Traceback" not in done.stderr
    assert tp == 0 or "tp may be 1, 2, 4" in done.stderr


@pytest.mark.parametrize("case", ["G72-bfloat16-under-float16", "G72-big-endian"])
def test_other_type_of_the_same_size(case: str, workspace: Path) -> None:
    """Sizes agree; the manifest's digest tells."""
    path = workspace / WEIGHTS / "norm.weight"
    half = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float16)
    raw = half.bfloat16().view(torch.int16) if case.endswith("float16") else half.view(torch.int16)
    data = raw.numpy()
    path.write_bytes((data if case.endswith("float16") else data.byteswap()).tobytes())
    assert "norm.weight" in failures(workspace)


@pytest.mark.parametrize("case", ["G73-config.yaml", "G73-config.ini"])
def test_of_another_program_is_read_with_a_note(case: str, packed: Path, tmp_path: Path) -> None:
    kind = "new" if case.endswith("yaml") else "old"
    folder = foreign(Path(shutil.copytree(packed / kind, tmp_path / "ws")))
    report = verify_path(folder, packed / "awq")
    assert report.passed and any("digests could not be checked" in note for note in report.notes)
    done = run("quantize", "verify", folder, "--source", packed / "awq")
    assert done.returncode == 6 and "no manifest" in done.stdout


@pytest.mark.parametrize("case", ["G66-bit-before-pack", "G66-bit-before-unpack"])
def test_a_flipped_bit_is_not_handed_on(case: str, packed: Path, workspace: Path, tmp_path: Path) -> None:
    """The digest that names the source of a run is compared with the source's own manifest."""
    source, victim = workspace, workspace / WO
    if case.endswith("before-pack"):
        source = Path(shutil.copytree(packed / "awq", tmp_path / "awq"))
        victim = source / "model-00001-of-00002.safetensors"
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes(data)
    command = "pack" if case.endswith("before-pack") else "unpack"
    done = run("quantize", command, source, "-o", tmp_path / "out")
    assert done.returncode == 3 and victim.name in done.stderr and "sha256" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["G69-checkpoint"])
def test_another_group_size_in_the_checkpoint(case: str, packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed / "awq", tmp_path / "awq"))
    shutil.rmtree(folder / "tmq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["group_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"states a group_size of 64, but .* have groups of 128"):
        open_checkpoint(folder)


def test_the_template_that_names_the_chat_format(packed: Path, tmp_path: Path) -> None:
    """Several templates in tokenizer_config.json: the default one counts; one that is no text is refused."""
    folder = Path(shutil.copytree(packed / "awq", tmp_path / "awq"))
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": "<|start_header_id|>"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    write_workspace(open_checkpoint(folder), tmp_path / "ws")
    assert "chat_template: llama3" in (tmp_path / "ws" / WEIGHTS / "config.yaml").read_text()
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"chat_template\.jinja.* is not UTF-8"):
        write_workspace(open_checkpoint(folder), tmp_path / "ws2")


def test_the_way_there_and_back_by_commands(packed: Path, tmp_path: Path) -> None:
    done = run("quantize", "pack", packed / "awq", "-o", tmp_path / "ws", "--chat-template", "llama2")
    assert done.returncode == 0, done.stderr
    assert "chat_template: llama2" in (tmp_path / "ws" / WEIGHTS / "config.yaml").read_text()
    assert run("quantize", "verify", tmp_path / "ws", "--source", packed / "awq").returncode == 0
    assert run("quantize", "unpack", tmp_path / "ws", "-o", tmp_path / "back").returncode == 0
    one, other = open_checkpoint(packed / "awq"), open_checkpoint(tmp_path / "back")
    assert one.config == other.config
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert (packed / "awq" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    refused = run("quantize", "unpack", packed / "awq", "-o", tmp_path / "no")
    assert refused.returncode == 3 and "no TurboMind workspace" in refused.stderr
