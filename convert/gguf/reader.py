"""GGUF files become ordinary Hugging Face folders: weights dequantized, config, tokenizer and chat template from the metadata.

Quantized tensors are written as float32, because w = d q + m has more significant bits than fp16 or bf16 hold: the file's own
values are the reference of every figure made with it, so nothing may be lost. 16-bit tensors stay 16-bit.
N out features, K in features, D head_dim.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convert.errors import InputError
from convert.folder.boundary import reading
from convert.folder.cache import cache_folder
from convert.folder.disk_space import check_free_space
from convert.folder.files import (
    atomic_write,
    make_folder,
    safetensors_chunks,
    sha256_bytes,
    sha256_file,
    write_failure,
    write_json,
)
from convert.folder.json_files import show
from convert.folder.state import read_signed, self_digest
from convert.folder.temporary import LOCK, remove_abandoned, whole_folder
from convert.gguf.architectures import GgufArchitecture
from convert.gguf.config import read_config
from convert.gguf.names import EMBEDDING, FINAL_NORM, HEAD
from convert.gguf.parts import open_parts, part_paths
from convert.gguf.tokenizer import write_tokenizer
from convert.gguf.understood import check_metadata
from convert.hf.config import parse_config
from convert.hf.safetensors_files import check_finite
from convert.hf.tensor_folder import INDEX_NAME

LAYOUT_VERSION = 3  # of the folder that is written; part of its name in the cache
LIST_NAME = "unpacked.list"  # the digests of the files of an unpacked model; no pattern of a loader or copier takes it


BLOCK_TENSORS = {  # name in a GGUF file -> module of the families that are read from one
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
OTHER_TENSORS = {
    EMBEDDING: "model.embed_tokens.weight",
    FINAL_NORM: "model.norm.weight",
    HEAD: "lm_head.weight",
}


def unpack_gguf(path: Path, cache_dir: Path | None = None) -> Path:
    """The HF folder of a GGUF file, or of all parts of a split one, made on first use in the cache under the digest of the files.

    Raises InputError where what lies in the cache is not what was written there.
    """
    cache = (cache_folder() if cache_dir is None else cache_dir) / "gguf"
    digests = [sha256_file(part) for part in part_paths(path)]
    name = digests[0] if len(digests) == 1 else sha256_bytes("\n".join(digests).encode())
    target = cache / f"{name[:32]}-v{LAYOUT_VERSION}"
    remove_abandoned(cache)
    if target.is_dir():
        _check_cached(target, path)
    else:
        convert_gguf(path, target)
    return target


def _check_cached(folder: Path, source: Path) -> None:
    """Raises InputError where a file of the unpacked model is absent or has another content than was written."""
    try:
        files = read_signed(folder / LIST_NAME)["files"]
        bad = [name for name, digest in files.items() if sha256_file(folder / name) != digest]
    except InputError as error:
        bad, files = [str(error)], {}
    if bad:
        raise InputError(
            f"the unpacked copy of {show(source.name)} in the cache is damaged: {show(bad[0])} is not as it was written. Remove the folder "
            f"{show(str(folder))}; the next command unpacks it again."
        )


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the HF folder of a GGUF model; it appears whole or not at all. Raises InputError on a damaged or unknown file."""
    model = open_parts(path)
    with reading(path.name):
        row, config = read_config(path.name, model)
        check_metadata(path.name, row, model.fields, config)
        parse_config(config)  # every size within its bounds, before anything is made of them
        _check_blocks(path.name, config["num_hidden_layers"], model.tensors)
    size = sum(
        int(t.n_elements) * (2 if t.tensor_type.name in ("F16", "BF16") else 4)
        for t in model.tensors.values()
    )
    make_folder(folder.parent)
    check_free_space(folder.parent, size, f"unpacking {show(path.name)}")
    try:
        with whole_folder(folder) as temp, reading(path.name):
            _write_shards(temp, row, config, model.tensors)
            fields = model.fields
            write_tokenizer(temp, path.name, fields, config["vocab_size"], config["max_position_embeddings"])
            write_json(temp / "config.json", config)
            special = ("bos_token_id", "eos_token_id", "pad_token_id")
            write_json(
                temp / "generation_config.json", {key: config[key] for key in special if key in config}
            )
            names = sorted(place.name for place in temp.iterdir() if place.name != LOCK)
            listed = {"files": {name: sha256_file(temp / name) for name in names}}
            write_json(temp / LIST_NAME, listed | {"digest": self_digest(listed)})
    except OSError as error:
        raise write_failure(folder, error) from error


def _check_blocks(file: str, layers: int, tensors: Mapping[str, Any]) -> None:
    """Raises InputError where the metadata state another number of blocks than there are tensors of."""
    found = {name.split(".")[1] for name in tensors if name.startswith("blk.") and name.count(".") > 1}
    if found != {str(index) for index in range(layers)} if len(found) == layers else True:
        raise InputError(
            f"{show(file)}: the metadata state {layers:,} blocks, but the file holds tensors of {len(found):,}. It is cut short or "
            "damaged. Download it again."
        )


def gguf_file_in(folder: Path) -> Path | None:
    """The .gguf file of a folder that holds one and no config.json: what `quantize pack --format gguf` writes. Else None.

    Raises InputError where there are several.
    """
    if (folder / "config.json").exists():
        return None
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf")
    except OSError as error:
        raise InputError(f"{show(str(folder))} cannot be listed: {error.strerror}.") from error
    if len(files) > 1:
        listed = ", ".join(show(path.name) for path in files[:4])
        raise InputError(f"{show(str(folder))} holds {len(files)} .gguf files ({listed}): name one of them.")
    return files[0] if files else None


def unpermute(tensor: Tensor, heads: int) -> Tensor:
    """Rows (heads * D, ...) from llama.cpp's interleaved pairs (2j, 2j + 1) back to the two halves (j, j + D / 2) of each head."""
    rows = tensor.shape[0]
    paired = tensor.view(heads, rows // heads // 2, 2, *tensor.shape[1:])
    return paired.transpose(1, 2).reshape(tensor.shape)


def _load(tensor: Any) -> Tensor:
    """One GGUF tensor, (N, K) or (N,), float32 for quantized types, else its own dtype."""
    from gguf import quants

    kind = tensor.tensor_type.name
    try:
        if kind in ("F32", "F16"):
            values = torch.from_numpy(np.array(tensor.data))
        else:
            values = torch.from_numpy(
                np.ascontiguousarray(quants.dequantize(tensor.data, tensor.tensor_type))
            )
            values = values.bfloat16() if kind == "BF16" else values.float()
    except NotImplementedError as error:
        raise InputError(
            f"tensor {show(tensor.name)!r} has the GGUF type {kind}, which the gguf package cannot dequantize. Use another file."
        ) from error
    values = values.reshape([int(extent) for extent in reversed(tensor.shape)])
    check_finite(tensor.name, values)
    return values


def _write_shards(
    folder: Path, row: GgufArchitecture, config: Mapping[str, Any], tensors: Mapping[str, Any]
) -> None:
    layers = config["num_hidden_layers"]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    used = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
    modules = {**BLOCK_TENSORS, **row.tensors}
    weight_map: dict[str, str] = {}
    for index in range(layers + 1):
        shard = f"model-{index:05d}-of-{layers:05d}.safetensors"
        loaded: dict[str, Tensor] = {}
        if index < layers:
            for source, target in modules.items():
                for part in ("weight", "bias"):
                    name = f"blk.{index}.{source}.{part}"
                    if name not in tensors:
                        continue
                    used.add(name)
                    value = _load(tensors[name])
                    if source.endswith("norm"):
                        value = value - row.norm_offset
                    if row.permuted and source in heads:
                        value = unpermute(value, heads[source])
                    loaded[f"model.layers.{index}.{target}.{part}"] = value
            for source, target in row.stacked.items():
                name = f"blk.{index}.{source}.weight"
                if name in tensors:
                    used.add(name)
                    for expert, value in enumerate(_load(tensors[name])):
                        loaded[f"model.layers.{index}.{target.format(e=expert)}.weight"] = value
        else:
            for name, target in OTHER_TENSORS.items():
                if name in tensors:
                    used.add(name)
                    value = _load(tensors[name])
                    loaded[target] = value - row.norm_offset if name == FINAL_NORM else value
        atomic_write(folder / shard, safetensors_chunks(loaded))
        weight_map |= dict.fromkeys(loaded, shard)
    unknown = sorted(set(tensors) - used)
    if unknown:
        raise InputError(
            f"{len(unknown)} tensors of the GGUF file have no place in a {row.model_type} model, the first is {show(unknown[0])!r}. "
            "Use the model's safetensors."
        )
    write_json(folder / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})
