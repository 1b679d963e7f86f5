"""What is fuzzed: for each format that strangers write, one function that reads bytes as the program would.

A target may raise the errors of `convert.errors`, which is how bad input is told, and nothing else. It takes any bytes, leaves nothing
behind, and works in one folder in memory.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calib_data.readers import read_corpus
from convert.errors import TmqError
from convert.folder.files import json_bytes, safetensors_chunks
from convert.folder.journal import Journal
from convert.folder.json_files import parse_object
from convert.folder.output import OutputFolder
from convert.folder.state import folder_state, read_manifest, self_digest
from convert.gguf.reader import convert_gguf
from convert.hf.config import parse_config
from convert.hf.reader import open_hf
from convert.hf.safetensors_files import read_header, read_tensor
from convert.hf.tensor_folder import TensorFolder
from convert.tokenizer.byte_level import CHARACTER_OF_BYTE, bpe_document
from convert.tokenizer.tokenizer import load_tokenizer
from convert.turbomind.config import parse_config_yaml
from convert.turbomind.ini import parse_config_ini
from engine.model.kv_simulation import read_kv_params

TEXT = "Hello w\u00f6rld 12  <s>\n"
LARGEST_TENSOR = 2**20
RUN = {"tool": "turbomind-quant", "format": 1, "fingerprint": {"seed": 1}}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}

_place = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))


def _file(name: str, data: bytes) -> Path:
    path = _place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _fresh(name: str) -> Path:
    shutil.rmtree(_place / name, ignore_errors=True)
    return _place / name


def _shard() -> bytes:
    import torch

    hidden, inner = 16, 16
    shapes = {"model.embed_tokens": (8, hidden), "model.norm": (hidden,)}
    block = "model.layers.0."
    shapes |= {f"{block}self_attn.{n}_proj": (16 if n in "qo" else 8, hidden) for n in "qkvo"}
    shapes |= {f"{block}mlp.{n}_proj": (inner, hidden) for n in ("gate", "up", "down")}
    shapes |= {f"{block}{n}_layernorm": (hidden,) for n in ("input", "post_attention")}
    tensors = {f"{name}.weight": torch.ones(shape, dtype=torch.float16) for name, shape in shapes.items()}
    return b"".join(bytes(chunk) for chunk in safetensors_chunks(tensors))


def _tokenizer() -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    vocab = {character: byte for byte, character in CHARACTER_OF_BYTE.items()} | {"ab": 256}
    return {
        "version": "1.0",
        "added_tokens": [{"id": 257, "content": "<s>", "special": True, **flags}],
        "normalizer": None,
        "pre_tokenizer": level,
        **bpe_document(vocab, [["a", "b"]]),
    }


def safetensors(data: bytes) -> None:
    for info in read_header(_file("x.safetensors", data)).values():
        if info.end - info.start <= LARGEST_TENSOR:
            read_tensor(info)


def index(data: bytes) -> None:
    folder = _place / "index"
    if not folder.exists():
        _file("index/a.safetensors", _shard())
    _file("index/model.safetensors.index.json", data)
    TensorFolder(folder)


def config(data: bytes) -> None:
    parse_config(parse_object(data, "config.json"))


def checkpoint(data: bytes) -> None:
    if not (_place / "checkpoint").exists():
        _file("checkpoint/model.safetensors", _shard())
    _file("checkpoint/config.json", data)
    open_hf(_place / "checkpoint")


def tokenizer_json(data: bytes) -> None:
    _file("tokenizer_json/tokenizer.json", data)
    load_tokenizer(_place / "tokenizer_json").encode(TEXT)


def tokenizer_config(data: bytes) -> None:
    if not (_place / "tokenizer_config").exists():
        _file("tokenizer_config/tokenizer.json", json.dumps(_tokenizer()).encode())
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        _file(f"tokenizer_config/{name}", data)
    load_tokenizer(_place / "tokenizer_config").encode_plain(TEXT)


def sentencepiece(data: bytes) -> None:
    _file("sentencepiece/tokenizer.model", data)
    load_tokenizer(_place / "sentencepiece").encode(TEXT)


def tiktoken(data: bytes) -> None:
    _file("tiktoken/qwen.tiktoken", data)
    load_tokenizer(_place / "tiktoken").encode(TEXT)


def gguf(data: bytes) -> None:
    convert_gguf(_file("x.gguf", data), _fresh("gguf"))


def yaml(data: bytes) -> None:
    parse_config_yaml(data.decode("utf8", "replace"), "config.yaml")


def ini(data: bytes) -> None:
    parse_config_ini(data.decode("utf8", "replace"), "config.ini")


def manifest(data: bytes) -> None:
    """Signed anew, so that what is damaged is what the digest covers."""
    _file("manifest/run.json", json_bytes(RUN))
    try:
        document = parse_object(data, "manifest.json")
        data = json_bytes(document | {"digest": self_digest(document)})
    except (TmqError, ValueError):
        pass
    _file("manifest/manifest.json", data)
    read_manifest(_place / "manifest").check_sizes(_place / "manifest")


def run(data: bytes) -> None:
    _file("run/run.json", data)
    folder_state(_place / "run")
    with OutputFolder.begin(_place / "run", RUN["fingerprint"], layout="root"):
        pass


def journal(data: bytes) -> None:
    path = _file("journal/work/files.jsonl", data)
    Journal(path).read()
    _file("journal/run.json", json_bytes(RUN))
    with OutputFolder.begin(_place / "journal", RUN["fingerprint"], layout="root", restart=True):
        pass


def kv_params(data: bytes) -> None:
    _file("kv/kv_params.safetensors", data)
    read_kv_params(_place / "kv", parse_config(LLAMA)[0])


def jsonl(data: bytes) -> None:
    read_corpus(_file("x.jsonl", data))


def json_text(data: bytes) -> None:
    read_corpus(_file("x.json", data))


def parquet(data: bytes) -> None:
    read_corpus(_file("x.parquet", data))


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function
    for function in (
        *(
            safetensors,
            index,
            config,
            checkpoint,
            tokenizer_json,
            tokenizer_config,
            sentencepiece,
            tiktoken,
            gguf,
        ),
        *(yaml, ini, manifest, run, journal, kv_params, jsonl, json_text, parquet),
    )
}


def call(name: str, data: bytes) -> bool:
    """Whether the target took the bytes; False where it refused them by a named error. Raises whatever else it raised."""
    try:
        TARGETS[name](data)
    except TmqError:
        return False
    return True


def remove_place() -> None:
    """Remove the folder that the targets work in."""
    shutil.rmtree(_place, ignore_errors=True)
