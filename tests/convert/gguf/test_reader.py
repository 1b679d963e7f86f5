"""GGUF files: written with llama.cpp's own package, opened as Hugging Face folders, compared with arithmetic by hand.

The full demo model is checked where its GGUF lies in the cache (`TMQ_CACHE`, or the user's).
"""

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_gguf import TOKENS, write_gguf
from tiny_models import DIM, HEADS, INNER, KV, H

from convert.errors import InputError
from convert.folder.cache import cache_folder
from convert.gguf.file import open_gguf
from convert.gguf.reader import convert_gguf, unpermute
from convert.readers import open_checkpoint
from convert.tokenizer.tokenizer import load_tokenizer


def q4_1_by_hand(path: Path, name: str, shape: tuple[int, int]) -> np.ndarray:
    """Blocks of 32 weights in 20 bytes: fp16 d, fp16 m, 16 bytes of nibbles, the low ones first. w = d q + m."""
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    raw = bytes(tensor.data.tobytes())
    values = []
    for at in range(0, len(raw), 20):
        d, m = struct.unpack("<ee", raw[at : at + 4])
        nibbles = raw[at + 4 : at + 20]
        values += [d * (b & 15) + m for b in nibbles] + [d * (b >> 4) + m for b in nibbles]
    return np.array(values).reshape(shape)  # float64


def test_weights_are_the_file_s_own_values(tmp_path) -> None:
    path = tmp_path / "m.gguf"
    weights = write_gguf(path)
    ckpt = open_checkpoint(path, cache_dir=tmp_path / "cache")
    assert (
        ckpt.config.dtype == "float32" and ckpt.config.tie_embeddings and ckpt.config.rope_theta == 100000.0
    )
    assert ckpt.config.norm_eps == 1e-5  # not 9.999999747378752e-06
    block = ckpt.block(1)
    for role, name, shape in (
        ("up", "ffn_up", (INNER, H)),
        ("down", "ffn_down", (H, INNER)),
        ("v", "attn_v", (KV * DIM, H)),
    ):
        exact = q4_1_by_hand(path, f"blk.1.{name}.weight", shape)
        # float32 holds d q + m unless m is far larger than d; here to the last bit
        assert np.array_equal(block.linears[role].weight.numpy(), exact.astype(np.float32)), role
        assert not np.array_equal(block.linears[role].weight.half().numpy(), exact)  # float16 would not
    assert torch.equal(ckpt.embedding(), torch.from_numpy(weights["token_embd.weight"]))
    assert torch.equal(block.norms["attn_norm"], torch.from_numpy(weights["blk.1.attn_norm.weight"]))


def test_rows_of_q_and_k_are_put_back_in_halves(tmp_path) -> None:
    """llama.cpp's converter turns rows (half, j) of a head into (j, half), as its source states; numbered rows show the way back."""
    rows = np.arange(HEADS * DIM).reshape(HEADS, 2, DIM // 2)
    stored = rows.swapaxes(1, 2).reshape(-1)  # what the converter writes
    assert unpermute(torch.from_numpy(stored), HEADS).tolist() == list(range(HEADS * DIM))
    path = tmp_path / "m.gguf"
    write_gguf(path)
    block = open_checkpoint(path, cache_dir=tmp_path).block(0)
    for role, name, heads in (("q", "attn_q", HEADS), ("k", "attn_k", KV)):
        exact = q4_1_by_hand(path, f"blk.0.{name}.weight", (heads * DIM, H)).astype(np.float32)
        found = block.linears[role].weight.numpy()
        for head in range(heads):
            for j in range(DIM // 2):
                assert np.array_equal(found[head * DIM + j], exact[head * DIM + 2 * j])
                assert np.array_equal(found[head * DIM + DIM // 2 + j], exact[head * DIM + 2 * j + 1])


def test_qwen2_is_not_permuted_and_has_biases(tmp_path) -> None:
    path = tmp_path / "m.gguf"
    weights = write_gguf(path, "qwen2", pre="qwen2")
    block = open_checkpoint(path, cache_dir=tmp_path).block(0)
    exact = q4_1_by_hand(path, "blk.0.attn_q.weight", (HEADS * DIM, H)).astype(np.float32)
    assert np.array_equal(block.linears["q"].weight.numpy(), exact)
    assert torch.equal(block.linears["k"].bias, torch.from_numpy(weights["blk.0.attn_k.bias"]))


@pytest.mark.parametrize(("stated", "expected"), [(False, False), (True, True), (None, False)])
def test_trap_bos_is_added_only_where_the_file_says_so(stated: bool | None, expected: bool, tmp_path) -> None:
    write_gguf(tmp_path / "m.gguf", **({} if stated is None else {"add_bos": stated}))
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    tokenizer = load_tokenizer(tmp_path / "hf")
    assert (tokenizer.encode("ab")[0] == 0) is expected
    assert (tokenizer.bos_id == 0) is expected
    # transformers reads the same folder in the same way
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("ab").input_ids == tokenizer.encode("ab")


def test_trap_digits_are_split_before_the_merges(tmp_path) -> None:
    """`smollm` splits "1990" into digits, so that the merge of 1 and 9 is never made; `gpt-2` makes it."""
    write_gguf(tmp_path / "digits.gguf")
    write_gguf(tmp_path / "runs.gguf", pre="gpt-2")
    convert_gguf(tmp_path / "digits.gguf", tmp_path / "digits")
    convert_gguf(tmp_path / "runs.gguf", tmp_path / "runs")
    by_name = {token: index for index, token in enumerate([*TOKENS, "19", "ab", "Ġa"])}
    found = load_tokenizer(tmp_path / "digits").encode("ab a 1990")
    assert found == [by_name[t] for t in ("ab", "Ġa", "Ġ", "1", "9", "9", "0")]
    found = load_tokenizer(tmp_path / "runs").encode("ab a 1990")
    assert found == [by_name[t] for t in ("ab", "Ġa", "Ġ", "19", "9", "0")]


def test_metadata_of_the_chat(tmp_path) -> None:
    write_gguf(tmp_path / "m.gguf")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    tokenizer = load_tokenizer(tmp_path / "hf")
    assert tokenizer.eos_token_ids == (1,)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a<|end|>"}])[-1] == 1
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a<|end|>"}]).count(1) == 1


def test_the_cache_is_named_by_the_digest_and_used_again(tmp_path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    cache = tmp_path / "cache"
    first = open_checkpoint(path, cache_dir=cache)
    state = {p: p.stat().st_mtime_ns for p in first.path.iterdir()}
    path.rename(tmp_path / "other name.gguf")
    again = open_checkpoint(tmp_path / "other name.gguf", cache_dir=cache)
    assert again.path == first.path and state == {p: p.stat().st_mtime_ns for p in again.path.iterdir()}
    assert [p.name for p in (cache / "gguf").iterdir()] == [first.path.name]  # nothing temporary is left
    assert cache_folder({"TMQ_CACHE": "/x"}) == Path("/x")


def test_two_conversions_give_the_same_bytes(tmp_path) -> None:
    write_gguf(tmp_path / "m.gguf")
    for name in ("one", "two"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.3, 0.9, 0.999])
def test_A09_cut_gguf(share: float, tmp_path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match=r"m\.gguf"):
        open_checkpoint(path, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.999])
def test_A09_a_cut_gguf_tells_its_bytes(share: float, tmp_path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    wanted = rf"m\.gguf is {int(len(data) * share):,} bytes but its header needs {len(data):,}: the file is cut short"
    with pytest.raises(InputError, match=wanted):
        open_gguf(path)
    path.write_bytes(data[:3000])
    with pytest.raises(
        InputError, match=r"is 3,000 bytes, in which its header of \d+ metadata keys and 20 tensors has no"
    ) as caught:
        open_gguf(path)
    assert "index" not in str(caught.value) and "reshape" not in str(caught.value)


def test_a_tensor_of_an_unknown_type_is_named(tmp_path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    data = bytearray(path.read_bytes())
    name = b"output_norm.weight"
    at = data.index(name) + len(name) + 4 + 8  # behind the count of dimensions and the one dimension
    data[at : at + 4] = struct.pack("<I", 999)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"tensor 'output_norm\.weight' has the type 999"):
        open_gguf(path)


ODD = {
    "A04-architecture": ({"architecture": "gpt2"}, "architecture 'gpt2'"),
    "A16-pre-tokenizer": ({"pre": "surprise"}, "pre-tokenizer 'surprise'"),
    "F55-nan": ({"nan": True}, "output_norm.weight"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_gguf(case: str, tmp_path) -> None:
    options, words = ODD[case]
    write_gguf(tmp_path / "m.gguf", **options)
    with pytest.raises(InputError, match=words):
        open_checkpoint(tmp_path / "m.gguf", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "gguf").glob("*"))


@pytest.mark.parametrize(
    "data",
    [b"GGUF" + b"\xff" * 40, b"not a model" * 9, b"version https://git-lfs"],
    ids=["A10-counts", "A12-text", "A12-lfs"],
)
def test_no_gguf(data: bytes, tmp_path) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(InputError, match=r"m\.gguf"):
        open_checkpoint(tmp_path / "m.gguf", cache_dir=tmp_path)


@pytest.mark.e2e
def test_demo_tokens(shared_data: Path) -> None:
    """304,978 tokens for the rows of WikiText-2's test split, the count of every figure on record; no BOS."""
    found = sorted(cache_folder().rglob("SmolLM2-135M-Instruct.Q4_1.gguf"))
    if not found:
        pytest.skip("the demo model is not in the cache: scripts/demo.sh puts it there")
    folder = open_checkpoint(found[0], cache_dir=cache_folder()).path
    tokenizer = load_tokenizer(folder)
    lines = (shared_data / "wiki.test.raw").read_text(encoding="utf-8").split("\n")[:-1]
    rows = ["" if not line.strip() else line + "\n" for line in lines]
    ids = tokenizer.encode("\n\n".join(rows))
    assert len(ids) == 304_978 and tokenizer.bos_id is None
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
