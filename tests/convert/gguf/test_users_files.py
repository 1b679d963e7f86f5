"""GGUF files as users bring them: in parts, with metadata that change the mathematics, damaged in the cache, or claiming too much."""

import fcntl
import json
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_gguf import write_gguf

from convert.errors import InputError
from convert.folder.files import TEMP_SUFFIX
from convert.folder.temporary import LOCK, remove_abandoned, whole_folder
from convert.gguf.header import check_header
from convert.gguf.parts import open_parts, part_paths
from convert.gguf.tokenizer import PRE_TOKENIZERS
from convert.inspect import inspect_path
from convert.readers import open_checkpoint
from convert.tokenizer.tokenizer import load_tokenizer

HIDDEN, INNER, LAYERS, VOCAB = 32, 32, 2, 6
TOKENS = ["a", "b", "ab", "<|text_end|>", "<|im_end|>", "<|x|>"]


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.{n}": (HIDDEN, HIDDEN)
            for n in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        }
        shapes |= {f"blk.{i}.{n}": (HIDDEN // 2, HIDDEN) for n in ("attn_k", "attn_v")}
        shapes |= {f"blk.{i}.{n}": (HIDDEN,) for n in ("attn_norm", "ffn_norm")}
    shapes["output"] = (VOCAB, HIDDEN)
    return {f"{n}.weight": generator.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}


def write(
    path: Path, tensors: dict[str, np.ndarray], *, meta: bool = True, blocks: int = LAYERS, **extra: object
) -> Path:
    """A Llama. `extra`: further metadata, "__" for "."."""
    writer = gguf.GGUFWriter(path, "llama")
    if meta:
        writer.add_context_length(64)
        writer.add_embedding_length(HIDDEN)
        writer.add_block_count(blocks)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(str(extra.pop("pre", "gpt-2")))
        writer.add_token_list(TOKENS)
        writer.add_token_types([1, 1, 1, 3, 3, 3])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(3)
    for key, value in extra.items():
        name = key.replace("__", ".")
        kind = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        kind[type(value)](name, value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_parts(folder: Path, count: int = 2) -> list[Path]:
    """The model in parts; the head lies in the last one."""
    tensors = weights()
    names = list(tensors)
    cuts = [names[:-1], *([[]] * (count - 2)), names[-1:]]
    paths = []
    for number, cut in enumerate(cuts):
        path = folder / f"m-{number + 1:05d}-of-{count:05d}.gguf"
        split = {"split__no": number, "split__count": count, "split__tensors__count": len(names)}
        paths.append(write(path, {name: tensors[name] for name in cut}, meta=number == 0, **split))
    return paths


def test_K117_parts_are_one_model_from_either_end(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    for path in paths:
        ckpt = open_checkpoint(path, cache_dir=tmp_path / "cache")
        assert not ckpt.config.tie_embeddings
        assert torch.equal(ckpt.lm_head(), torch.from_numpy(weights()["output.weight"]))
    assert len(list((tmp_path / "cache" / "gguf").iterdir())) == 1
    report = inspect_path(paths[1])
    assert len(report.tensors) == len(weights()) and report.size_bytes == sum(p.stat().st_size for p in paths)


def test_K117_a_missing_part_is_named_and_nothing_is_kept(tmp_path: Path) -> None:
    first, second = write_parts(tmp_path)
    second.unlink()
    with pytest.raises(InputError, match=r"1 are missing: m-00002-of-00002\.gguf"):
        open_checkpoint(first, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache" / "gguf").exists()
    with pytest.raises(InputError, match=r"part 0 of 2 of a split model, but its name does not say so"):
        open_checkpoint(first.rename(tmp_path / "renamed.gguf"), cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match="no part that there can be"):
        part_paths(tmp_path / "m-00003-of-00002.gguf")


def test_K117_parts_of_other_models_are_refused(tmp_path: Path) -> None:
    first, second = write_parts(tmp_path)
    write(second, {"output.weight": weights()["output.weight"]}, meta=False, split__no=0, split__count=2)
    with pytest.raises(InputError, match="its name makes it part 1 of 2"):
        open_parts(first)
    write(second, {}, meta=False, split__no=1, split__count=2)
    with pytest.raises(InputError, match=r"hold \d+ tensors, but the metadata states"):
        open_parts(first)
    write(second, weights(), meta=False, split__no=1, split__count=2)
    with pytest.raises(InputError, match="an earlier part both hold"):
        open_parts(first)


@pytest.mark.parametrize(
    ("extra", "ends"),
    [
        ({"tokenizer__ggml__eot_token_id": 5}, {3, 4, 5}),
        ({"tokenizer__ggml__eom_token_id": 5}, {3, 4, 5}),
        ({}, {3, 4}),  # <|im_end|> is a control token that ends a turn
    ],
    ids=["K118-eot", "K118-eom", "K118-by-name"],
)
def test_answers_end_with_every_end_that_is_stated(extra: dict, ends: set[int], tmp_path: Path) -> None:
    ckpt = open_checkpoint(write(tmp_path / "m.gguf", weights(), **extra), cache_dir=tmp_path)
    assert set(ckpt.config.eos_token_ids) == ends
    assert set(load_tokenizer(ckpt.path).eos_token_ids) == ends
    assert set(json.loads((ckpt.path / "generation_config.json").read_text())["eos_token_id"]) == ends


def test_K119_yarn_is_read_with_all_its_numbers(tmp_path: Path) -> None:
    yarn = {
        "type": "yarn",
        "factor": 8.0,
        "original_context_length": 16,
        "yarn_beta_fast": 4.0,
        "yarn_beta_slow": 2.0,
    }
    yarn["yarn_attn_factor"] = 1.25
    extra = {f"llama__rope__scaling__{name}": value for name, value in yarn.items()}
    scaling = open_checkpoint(
        write(tmp_path / "m.gguf", weights(), **extra), cache_dir=tmp_path
    ).config.rope_scaling
    assert scaling is not None and (scaling.factor, scaling.original_max_position) == (8.0, 16)
    assert (scaling.beta_fast, scaling.beta_slow, scaling.attention_factor) == (4.0, 2.0, 1.25)


ODD = {
    "K120-unknown": ({"llama__attention__some_scale": 0.5}, "attention.some_scale = 0.5"),
    "K120-causal": ({"llama__attention__causal": False}, "attention.causal = False"),
    "K120-logits": ({"llama__logit_scale": 0.0625}, "logit_scale = 0.0625"),
    "K120-softcap": ({"llama__final_logit_softcapping": 30.0}, "final_logit_softcapping = 30"),
    "K120-window": ({"llama__attention__sliding_window": 16}, "attention.sliding_window = 16"),
    "K120-value-length": ({"llama__attention__value_length": 8}, "attention.value_length = 8"),
    "K120-ext-factor": ({"llama__rope__scaling__yarn_ext_factor": 0.5}, "yarn_ext_factor = 0.5"),
    "K128-adapter": ({"general__type": "adapter"}, "a LoRA adapter, not a model"),
    "K128-image-part": ({"general__type": "mmproj"}, "the image part of a model"),
}


@pytest.mark.parametrize("case", ODD)
def test_metadata_with_other_mathematics_are_refused_by_name(case: str, tmp_path: Path) -> None:
    extra, words = ODD[case]
    with pytest.raises(InputError) as caught:
        open_checkpoint(write(tmp_path / "m.gguf", weights(), **extra), cache_dir=tmp_path / "cache")
    assert words in str(caught.value)
    assert not list((tmp_path / "cache").glob("gguf/*"))


def test_K120_metadata_that_change_nothing_are_taken(tmp_path: Path) -> None:
    extra = {
        "llama__attention__causal": True,
        "llama__attention__value_length": 16,
        "llama__logit_scale": 1.0,
    }
    extra |= {"llama__vocab_size": VOCAB, "llama__expert_count": 0, "llama__attention__sliding_window": 64}
    assert (
        open_checkpoint(write(tmp_path / "m.gguf", weights(), **extra), cache_dir=tmp_path).config.num_layers
        == LAYERS
    )


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("deepseek-r1-qwen", "qwen2"),
        ("llama-v3", "llama-bpe"),
        ("smaug-bpe", "llama-bpe"),
        ("falcon3", "llama-bpe"),
    ],
    ids=lambda v: f"K121-{v}" if v in ("deepseek-r1-qwen", "llama-v3", "smaug-bpe", "falcon3") else "",
)
def test_aliases_of_pre_tokenizers_split_alike(alias: str, name: str, tmp_path: Path) -> None:
    assert PRE_TOKENIZERS[alias] == PRE_TOKENIZERS[name]
    ckpt = open_checkpoint(write(tmp_path / "m.gguf", weights(), pre=alias), cache_dir=tmp_path)
    assert load_tokenizer(ckpt.path).encode("ab", add_bos=False) == [2]


@pytest.mark.parametrize("blocks", [1, 3, 4096, 2**32 - 1], ids=lambda n: f"J108-{n}")
def test_a_block_count_that_the_tensors_do_not_have(blocks: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"block|num_hidden_layers"):
        open_checkpoint(write(tmp_path / "m.gguf", weights(), blocks=blocks), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("gguf/*"))


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


CLAIMS = {
    "elements": text(b"k") + struct.pack("<IIQ", 9, 0, 2**40),
    "nested": text(b"k") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 0, 1),
    "string": text(b"k") + struct.pack("<IQ", 8, 2**60),
    "kind": text(b"k") + struct.pack("<I", 99),
    "key": struct.pack("<Q", 2**50),
}


@pytest.mark.parametrize("case", CLAIMS, ids=lambda c: f"J108-{c}")
def test_a_header_may_not_claim_what_the_file_cannot_hold(case: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + CLAIMS[case] + b"\0" * 64)
    with pytest.raises(InputError, match=r"m\.gguf"):
        check_header(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0) + b"\0" * 64)
    with pytest.raises(InputError, match="plausible counts"):
        check_header(path)


def test_J114_a_changed_byte_in_the_cache_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    folder = open_checkpoint(path, cache_dir=tmp_path / "cache").path
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole[:-2] + bytes([whole[-2] ^ 64]) + whole[-1:])
        with pytest.raises(
            InputError, match=r"the unpacked copy of m\.gguf in the cache is damaged"
        ) as caught:
            open_checkpoint(path, cache_dir=tmp_path / "cache")
        assert str(folder) in str(caught.value)
        file.write_bytes(whole)
    assert open_checkpoint(path, cache_dir=tmp_path / "cache").path == folder


def test_J114_what_a_killed_process_left_is_removed_and_the_rest_stays(tmp_path: Path) -> None:
    dead = tmp_path / f".x.1{TEMP_SUFFIX}"
    dead.mkdir()
    (dead / "model").write_bytes(b"0" * 100)
    alive = tmp_path / f".y.2{TEMP_SUFFIX}"
    alive.mkdir()
    handle = os.open(alive / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    (tmp_path / "z").mkdir()
    assert remove_abandoned(tmp_path) == [dead.name]
    assert alive.is_dir() and (tmp_path / "z").is_dir() and not dead.exists()
    os.close(handle)
    assert remove_abandoned(tmp_path) == [alive.name]


def test_J114_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "cache") as temp:
        (temp / "a").write_text("1")
        raise ZeroDivisionError
    assert not list(tmp_path.glob("*cache*/*"))
    with whole_folder(tmp_path / "cache") as temp:
        (temp / "a").write_text("1")
        assert remove_abandoned(tmp_path) == []  # it is being filled
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["a"]
