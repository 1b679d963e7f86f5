"""Group A of the fault table: damaged, hostile or odd checkpoint folders. One test id a case, and one clear error each."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_models import CONFIGS, random_tensors, tokenizer_document, write_model

from convert.errors import InputError, TmqError
from convert.folder.files import check_output_place
from convert.hf.config import parse_config
from convert.hf.safetensors_files import read_header, read_tensor
from convert.readers import open_checkpoint
from convert.tokenizer.tokenizer import load_tokenizer


@pytest.fixture
def model(tmp_path) -> Path:
    write_model(tmp_path / "m")
    return tmp_path / "m"


def refused(path: Path, *words: str) -> str:
    """Opening raises InputError, exit 3, whose message holds the words and is one that a user can read."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert caught.value.exit_code == 3 and "\n" not in message and len(message) < 1200
    return message


def edit_config(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))


# A01


@pytest.mark.parametrize("case", ["missing", "empty", "file"], ids=lambda c: f"A01-{c}")
def test_folder(case: str, tmp_path) -> None:
    path = tmp_path / "m"
    if case == "empty":
        path.mkdir()
    if case == "file":
        path.write_text("text")
    refused(path, {"missing": "does not exist", "empty": "is empty", "file": "is a file"}[case])


# A02

CONFIG_BYTES = {
    "empty": (b"", "empty"),
    "not-json": (b"{hidden_size: 64}", "not JSON"),
    "not-utf8": (b'{"model_type": "\xff\xfe"}', "not UTF-8"),
    "nested": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "nested"),
    "nested-100": (b'{"a":' * 100 + b"1" + b"}" * 100, "nested"),
    "list": (b"[1, 2]", "expected an object"),
    "twice": (b'{"hidden_size": 64, "hidden_size": 128}', "twice"),
    "digits": (b'{"hidden_size": ' + b"9" * 10_000 + b"}", "too long"),
}


@pytest.mark.parametrize("case", CONFIG_BYTES, ids=lambda c: f"A02-{c}")
def test_config_file(case: str, model: Path) -> None:
    data, word = CONFIG_BYTES[case]
    (model / "config.json").write_bytes(data)
    refused(model, "config.json", word)


def test_config_absent(model: Path) -> None:
    (model / "config.json").unlink()
    refused(model, "holds no config.json")


def test_config_of_a_gibibyte(model: Path) -> None:
    with (model / "config.json").open("wb") as file:
        file.truncate(2**30)  # sparse: takes no disk
    refused(model, "config.json", "1,073,741,824 bytes")


# A03

CONFIG_VALUES = {
    "missing": ("hidden_size", None),
    "text": ("hidden_size", "4096"),
    "float": ("hidden_size", 64.0),
    "true": ("num_hidden_layers", True),
    "zero": ("num_attention_heads", 0),
    "negative": ("intermediate_size", -96),
    "huge": ("hidden_size", 10**12),
    "huge-vocab": ("vocab_size", 10**12),
    "nan": ("rms_norm_eps", float("nan")),
    "infinite": ("rms_norm_eps", float("inf")),
    "eps-text": ("rms_norm_eps", "1e-5"),
    "theta": ("rope_theta", -1.0),
    "heads": ("num_key_value_heads", 3),
    "list": ("vocab_size", [128]),
    "rope": ("rope_scaling", {"rope_type": "surprise", "factor": 2.0}),
    "rope-factor": ("rope_scaling", {"type": "linear"}),
    "rope-list": ("rope_scaling", [1]),
    "tied": ("tie_word_embeddings", "yes"),
    "act": ("hidden_act", "gelu"),
    "dtype": ("torch_dtype", "int7"),
    "eos": ("eos_token_id", "2"),
}


@pytest.mark.parametrize("case", CONFIG_VALUES, ids=lambda c: f"A03-{c}")
def test_config_value(case: str, model: Path) -> None:
    key, value = CONFIG_VALUES[case]
    raw = json.loads((model / "config.json").read_text())
    raw.pop(key, None)
    if value is not None:
        raw[key] = value
    (model / "config.json").write_text(json.dumps(raw))
    words = {"rope": "RoPE", "rope-factor": "factor", "heads": "heads", "dtype": "dtype"}.get(case, key)
    refused(model, "config.json", words)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [
        *sorted({key for config in CONFIGS.values() for key in config}),
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "layer_types",
        "max_window_layers",
        "use_sliding_window",
        "dtype",
        "attention_bias",
        "mlp_bias",
        "quantization_config",
        "partial_rotary_factor",
        "auto_map",
        "original_max_position_embeddings",
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    family=st.sampled_from(["llama", "qwen2", "qwen", "mixtral", "internlm"]),
    changes=st.dictionaries(KEYS, JSON, max_size=4),
)
def test_any_config_is_read_or_refused(family: str, changes: dict[str, object]) -> None:
    try:
        parse_config(CONFIGS[family] | changes)
    except InputError as error:
        assert str(error)


# A04, A05, A14


@pytest.mark.parametrize(
    ("case", "architecture", "near"),
    [
        ("A04-near", "LlamaForCausalML", "LlamaForCausalLM"),
        ("A04-far", "Zzz", "Known families"),
        ("A04-t5", "Qwen9ForCausalLM", "Qwen"),
    ],
    ids=lambda v: v if isinstance(v, str) and v.startswith("A04") else "",
)
def test_unknown_architecture(case: str, architecture: str, near: str, model: Path) -> None:
    edit_config(model, architectures=[architecture], model_type="other")
    refused(model, architecture, near, "--family")


@pytest.mark.parametrize(
    "method", ["eetq", "compressed-tensors", "bitsandbytes", "awq-gemv", "hqq"], ids=lambda m: f"A05-{m}"
)
def test_other_quantization(method: str, model: Path) -> None:
    quant = {"quant_method": method, "bits": 4, "group_size": 32}
    if method == "awq-gemv":
        quant |= {"quant_method": "awq", "version": "gemv"}
    edit_config(model, quantization_config=quant)
    # AWQ, GPTQ, MLX and pack-quantized compressed-tensors of 4 bits are read
    refused(model, "gemv" if "gemv" in method else method, "Start from the original float checkpoint")


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("bits", {"bits": 8}),
        ("group", {"group_size": 7}),
        ("sym", {"zero_point": False}),
        ("type", {"group_size": "32"}),
    ],
    ids=lambda v: f"A05-awq-{v}" if isinstance(v, str) else "",
)
def test_odd_awq(case: str, change: dict[str, object], model: Path) -> None:
    quant = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
    } | change
    edit_config(model, quantization_config=quant)
    refused(model, "quantization_config", next(iter(change)))


def test_A14_code_of_a_known_family_is_ignored(model: Path) -> None:
    edit_config(
        model,
        auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"},
        _attn_implementation_internal="hub/kernel",
    )
    (model / "modeling_evil.py").write_text("raise SystemExit('ran')")
    ckpt = open_checkpoint(model)
    assert any("auto_map" in note for note in ckpt.notes)


def test_A14_code_of_an_unknown_family_is_refused(model: Path) -> None:
    edit_config(model, architectures=["EvilForCausalLM"], model_type="evil", auto_map={"AutoModel": "m.Evil"})
    refused(model, "never run", "--family")


# A06, A07, A08


def shards(folder: Path) -> tuple[dict, list[Path]]:
    write_model(folder, shards=3)
    return json.loads((folder / "model.safetensors.index.json").read_text()), sorted(
        folder.glob("*.safetensors")
    )


def test_A06_absent_shards_are_all_named(tmp_path) -> None:
    _, files = shards(tmp_path / "m")
    files[0].unlink()
    files[2].unlink()
    refused(tmp_path / "m", files[0].name, files[2].name)


def test_A07_extra_shard_is_ignored_with_a_note(tmp_path) -> None:
    shards(tmp_path / "m")
    save_file({"stray": torch.ones(1)}, tmp_path / "m" / "stray.safetensors")
    ckpt = open_checkpoint(tmp_path / "m")
    assert any("stray.safetensors" in note for note in ckpt.notes)


@pytest.mark.parametrize(
    "case", ["not-in-shard", "in-two", "path", "absolute", "no-map", "number"], ids=lambda c: f"A08-{c}"
)
def test_index(case: str, tmp_path) -> None:
    folder = tmp_path / "m"
    index, files = shards(folder)
    name, shard = next(iter(index["weight_map"].items()))
    if case == "not-in-shard":
        index["weight_map"][name] = next(f.name for f in files if f.name != shard)
    elif case == "in-two":
        other = next(f for f in files if f.name != shard)
        held = {
            n: t
            for n, t in random_tensors("llama").items()
            if index["weight_map"][n] == other.name or n == name
        }
        save_file(held, other)
    elif case == "no-map":
        index = {"metadata": {}}
    else:
        index["weight_map"][name] = {"path": "../m/" + shard, "absolute": str(folder / shard), "number": 5}[
            case
        ]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "weight_map" if case == "no-map" else name if case != "in-two" else "two files")


def test_A08_missing_and_foreign_tensors_are_named(model: Path) -> None:
    tensors = random_tensors("llama")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_model(model, tensors=tensors)
    refused(model, "model.layers.1.mlp.up_proj.weight", "lacks 1 tensors")


# A09


@pytest.mark.parametrize(
    "case", ["length", "header", "tensor", "byte", "nothing", "longer"], ids=lambda c: f"A09-{c}"
)
def test_cut_file(case: str, model: Path) -> None:
    path = model / "model.safetensors"
    data = path.read_bytes()
    (header,) = struct.unpack("<Q", data[:8])
    cut = {
        "length": 4,
        "header": 8 + header // 2,
        "tensor": 8 + header + 10,
        "byte": len(data) - 1,
        "nothing": 0,
    }
    path.write_bytes(data + b"\0" if case == "longer" else data[: cut[case]])
    refused(model, "model.safetensors", "bytes")


# A10


def with_header(path: Path, header: bytes, data: bytes = b"\0" * 16, length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {
        "dtype": dtype,
        "shape": [(end - start) // 4] if shape is None else shape,
        "data_offsets": [start, end],
    }


HEADERS = {
    "length-2-63": (b"{}", 2**63, "claims"),
    "longer-than-file": (b"{}", 500, "claims"),
    "not-json": (b"{a}", None, "not JSON"),
    "list": (b"[]", None, "expected an object"),
    "overlap": (json.dumps({"a": entry(0, 16), "b": entry(8, 16)}).encode(), None, "overlaps"),
    "reversed": (json.dumps({"a": entry(16, 0, [4])}).encode(), None, "needs"),
    "hole": (json.dumps({"a": entry(0, 4), "b": entry(8, 16)}).encode(), None, "hole"),
    "duplicate": (b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "a": 1}', None, "twice"),
    "dtype": (json.dumps({"a": entry(0, 16, dtype="F4")}).encode(), None, "unknown dtype"),
    "shape": (json.dumps({"a": entry(0, 16, [5])}).encode(), None, "needs 20"),
    "shape-overflow": (json.dumps({"a": entry(0, 16, [2**62, 2**62])}).encode(), None, "needs"),
    "negative": (json.dumps({"a": entry(-16, 0, [4])}).encode(), None, "whole numbers"),
    "offset-text": (
        json.dumps({"a": entry(0, 16) | {"data_offsets": ["0", "16"]}}).encode(),
        None,
        "whole numbers",
    ),
    "no-description": (b'{"a": 5}', None, "no description"),
}


@pytest.mark.parametrize("case", HEADERS, ids=lambda c: f"A10-{c}")
def test_header(case: str, tmp_path) -> None:
    header, length, word = HEADERS[case]
    with pytest.raises(InputError, match=word):
        read_header(with_header(tmp_path / "x.safetensors", header, length=length))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_file_is_noticed_or_harmless(data, tmp_path) -> None:
    """Flip, cut or insert bytes anywhere in the header: a clear error, or tensors of the stated shapes. Never anything else."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.float16)}, path)
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    if kind == "flip":
        raw[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del raw[at:]
    else:
        raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    path.write_bytes(raw)
    try:
        for info in read_header(path).values():
            assert tuple(read_tensor(info).shape) == info.shape
    except InputError as error:
        assert str(error)


# A11

SHAPES = {
    "gqa": ({"num_key_value_heads": 4}, "k_proj"),
    "vocab": ({"vocab_size": 120}, "embed_tokens"),
    "layers": ({"num_hidden_layers": 3}, "lacks"),
    "inner": ({"intermediate_size": 128}, "mlp"),
    "bias": ({"attention_bias": True}, "bias"),
}


@pytest.mark.parametrize("case", SHAPES, ids=lambda c: f"A11-{c}")
def test_shape_differs_from_config(case: str, model: Path) -> None:
    changes, word = SHAPES[case]
    edit_config(model, **changes)
    refused(model, word)


def test_A11_tied_head_absent_but_not_tied(model: Path) -> None:
    tensors = random_tensors("llama")
    del tensors["lm_head.weight"]
    write_model(model, tensors=tensors)
    refused(model, "lm_head.weight", "tie_word_embeddings")


def test_A11_tied_head_present(model: Path) -> None:
    """A head in the file that equals the embedding stays tied to it; one that differs is the head, whatever config.json says."""
    edit_config(model, tie_word_embeddings=True)
    ckpt = open_checkpoint(model)
    assert not ckpt.config.tie_embeddings and not torch.equal(ckpt.lm_head(), ckpt.embedding())
    assert any("is not the embedding" in note for note in ckpt.notes)
    tensors = random_tensors("llama")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_model(model, tensors=tensors, tie_word_embeddings=True)
    ckpt = open_checkpoint(model)
    assert ckpt.config.tie_embeddings and any("present but tied" in note for note in ckpt.notes)


def test_A11_biases_that_the_config_denies(model: Path) -> None:
    tensors = random_tensors("llama") | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64).half()}
    write_model(model, tensors=tensors)
    refused(model, "q_proj.bias", "config.json")


# A12, A13


@pytest.mark.parametrize("case", ["lfs", "html"], ids=lambda c: f"A12-{c}")
def test_not_weights(case: str, model: Path) -> None:
    text = {
        "lfs": "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n",
        "html": "\n<!DOCTYPE html><html><body>404</body></html>",
    }[case]
    (model / "model.safetensors").write_text(text)
    refused(model, {"lfs": "git lfs pull", "html": "web page"}[case])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"], ids=lambda n: f"A13-{n}")
def test_pickled_weights(name: str, model: Path) -> None:
    (model / "model.safetensors").rename(model / name)
    refused(model, name, "safetensors")


# A15


def test_A15_fp8_is_refused_by_name(model: Path) -> None:
    tensors = random_tensors("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    write_model(model, tensors=tensors)
    refused(model, name, "float8_e4m3fn")


def test_A15_mixed_dtypes_are_noted(model: Path) -> None:
    tensors = random_tensors("llama")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
    write_model(model, tensors=tensors)
    ckpt = open_checkpoint(model)
    assert any("float64" in n for n in ckpt.notes) and any("mixed dtypes" in n for n in ckpt.notes)
    assert ckpt.final_norm().dtype == torch.float32 and ckpt.lm_head().dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=lambda v: f"F55-{v}")
def test_non_finite_weight_is_named_and_counted(value: float, model: Path) -> None:
    tensors = random_tensors("llama")
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name][3, 5] = value
    tensors[name][4, 6] = value
    write_model(model, tensors=tensors)
    ckpt = open_checkpoint(model)
    ckpt.block(0)
    with pytest.raises(InputError, match=name) as caught:
        ckpt.block(1)
    assert "2 " in str(caught.value)


# A16


def test_A16_tokenizer_missing(model: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(model)


def test_A16_tokenizer_damaged(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Surprise"}}')
    with pytest.raises(InputError, match="damaged or of an unknown kind"):
        load_tokenizer(model)


def test_A16_tokenizer_larger_than_the_embedding(model: Path) -> None:
    (model / "tokenizer.json").write_text(json.dumps(tokenizer_document()))
    with pytest.raises(InputError, match="128 embeddings"):
        load_tokenizer(model).check_fits(128)


def test_A16_no_bos_no_eos_no_pad(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "tokenizer.json").write_text(json.dumps(tokenizer_document(special=())))
    tokenizer = load_tokenizer(model)
    assert (
        tokenizer.bos_id is None
        and tokenizer.eos_token_ids == ()
        and tokenizer.encode("a", add_bos=True) == tokenizer.encode("a")
    )


def test_A16_slow_only_tokenizer(model: Path) -> None:
    """vocab.json and merges.txt alone do not say how text is split before the merges."""
    (model / "vocab.json").write_text("{}")
    (model / "merges.txt").write_text("")
    with pytest.raises(InputError, match=r"expected tokenizer\.json, tokenizer\.model or qwen\.tiktoken"):
        load_tokenizer(model)


def test_A14_tokenizer_as_code_is_refused_and_shown(model: Path) -> None:
    (model / "tokenization_evil.py").write_text("raise SystemExit('ran')")
    (model / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}})
    )
    with pytest.raises(InputError, match=r"tokenization_evil\.py.*--trust-remote-code"):
        load_tokenizer(model)


# A17


@pytest.mark.parametrize(
    "name", ["with space", "quote'\"", "line\nbreak", "Modell-größe-模型"], ids=lambda n: f"A17-{n[:5]!r}"
)
def test_path_with_odd_characters(name: str, tmp_path) -> None:
    write_model(tmp_path / name)
    assert open_checkpoint(tmp_path / name).config.family == "llama"
    (tmp_path / name / "model.safetensors").write_bytes(b"")
    refused(tmp_path / name, "model.safetensors")


def test_A17_path_too_long(tmp_path) -> None:
    refused(tmp_path / ("x" * 5000))


def test_A17_symlink_loop(tmp_path) -> None:
    (tmp_path / "m").mkdir()
    os.symlink("config.json", tmp_path / "m" / "config.json")
    refused(tmp_path / "m", "config.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_A17_unreadable(model: Path) -> None:
    (model / "model.safetensors").chmod(0)
    refused(model, "model.safetensors", "ermission")


def test_A17_unreadable_is_reported(model: Path, monkeypatch) -> None:
    """The same for root, whom the file system refuses nothing."""
    opened = os.open

    def deny(path: Path, *args, **kwargs):
        if Path(path).name == "model.safetensors":
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", deny)
    refused(model, "model.safetensors", "Permission denied")


# A18


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a\0b", "a\x1b[31mred", "a\nb"], ids=lambda n: f"A18-{n[:6]!r}"
)
def test_tensor_name_is_only_a_name(name: str, model: Path) -> None:
    write_model(model, tensors=random_tensors("llama") | {name: torch.ones(1)})
    ckpt = open_checkpoint(model)
    note = next(n for n in ckpt.notes if "carried through" in n)
    assert "\x1b" not in note and "\n" not in note and "\0" not in note


# A19, A20


def test_A19_source_changes_while_it_is_read(model: Path) -> None:
    ckpt = open_checkpoint(model)
    ckpt.block(0)
    shutil.copy(model / "model.safetensors", model / "copy")
    os.replace(model / "copy", model / "model.safetensors")
    with pytest.raises(InputError, match="changed"):
        ckpt.block(1)


def test_A19_source_is_cut_while_it_is_read(model: Path) -> None:
    info = read_header(model / "model.safetensors")["lm_head.weight"]
    os.truncate(model / "model.safetensors", info.start + 10)
    with pytest.raises(InputError, match="ends inside"):
        read_tensor(info)


@pytest.mark.parametrize("case", ["equal", "inside", "around", "link"], ids=lambda c: f"A20-{c}")
def test_output_and_source_overlap(case: str, model: Path) -> None:
    out = {"equal": model, "inside": model / "out", "around": model.parent, "link": model.parent / "link"}[
        case
    ]
    if case == "link":
        os.symlink(model, out)
    with pytest.raises(InputError, match="one inside the other"):
        check_output_place(out, model)
    check_output_place(model.parent / "beside", model)


# C36


def test_C36_a_failing_disk_is_named_and_not_retried(model: Path, monkeypatch) -> None:
    ckpt = open_checkpoint(model)
    calls = []

    def fail(path: Path, *args, **kwargs):
        calls.append(path)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(TmqError, match=r"model\.safetensors.*Input/output error") as caught:
        ckpt.block(0)
    assert caught.value.exit_code == 4 and len(calls) == 1


def test_unfinished_output_is_no_checkpoint(model: Path) -> None:
    (model / "tmq").mkdir()
    (model / "tmq" / "run.json").write_text(
        json.dumps({"tool": "turbomind-quant", "format": 1, "fingerprint": {}})
    )
    refused(model, "unfinished", "--restart")
