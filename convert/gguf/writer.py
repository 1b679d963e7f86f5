"""Writes one .gguf file in a folder with a manifest: int4 codes as Q4_0 (every zero point 8) or Q4_1, the rest as F16 or Q8_0.

The header comes from llama.cpp's `gguf` package, the blocks from our integers (`convert.gguf.blocks`). Streamed: one block of
the model is in memory at a time. A run that was interrupted writes the file anew, because it is one file.
N out features, K in features, E experts, D head_dim.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convert.checkpoint import Checkpoint, Stored
from convert.config import QuantFormat
from convert.errors import InputError
from convert.families.table import bias_roles, linear_shapes, norm_shapes
from convert.folder.disk_space import check_free_space
from convert.folder.files import check_output_place, write_failure
from convert.folder.json_files import show
from convert.folder.output import OutputFolder
from convert.formats import Rest
from convert.gguf.blocks import BLOCK, BYTES, pack_blocks
from convert.gguf.metadata import architecture_of, model_fields, rope_factors
from convert.gguf.names import EMBEDDING, EXPERTS, FINAL_NORM, HEAD, NORMS, ROLES, ROPE, block_name
from convert.gguf.tokenizer_fields import tokenizer_fields
from convert.hf.writer import half_floats
from kernels.int4 import bits_per_weight
from kernels.packing import SEQUENTIAL_ORDER, pack_columns, unpack_columns

ALIGNMENT = 32  # of every tensor, the default of the format
FILE_TYPES = {"Q4_0": 2, "Q4_1": 3}  # LlamaFileType
Plan = dict[
    str, tuple[str, tuple[int, ...]]
]  # tensor -> (GGUF type, shape as torch has it), in the order of the file


@dataclass(frozen=True)
class GgufResult:
    """What was written."""

    file: Path
    kind: str
    size_bytes: int
    elapsed_s: float


def write_gguf(
    source: Checkpoint,
    out: Path,
    symmetric: bool,
    *,
    rest: Rest = "f16",
    restart: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> GgufResult:
    """Write OUT/model-Q4_0.gguf or model-Q4_1.gguf from an int4 checkpoint whose groups are multiples of 32.

    Args:
        symmetric: every zero point of the source is 8.
        rest: type of the embedding and the head; norms, biases and routers are F32, linears that stay float F16.

    Raises InputError where llama.cpp has no form for the model or its tokenizer, ResourceError on a full disk.
    """
    start = time.perf_counter()
    check_output_place(out, source.path)
    fmt = source.config.quantization
    assert fmt is not None
    kind = "Q4_0" if symmetric else "Q4_1"
    architecture = architecture_of(source.config)
    _check_sizes(source, fmt, rest)
    fields = model_fields(source.config, FILE_TYPES[kind], fmt.group_size)
    fields |= tokenizer_fields(source.tokenizer_dir, source.config.vocab_size, source.config.max_position)
    outer = "Q8_0" if rest == "q8_0" else "F16"
    plan: Plan = {}
    for part in plan_parts(source, kind, outer):
        plan |= part
    check_free_space(out, sum(size_bytes(*entry) for entry in plan.values()) + 2**24, "packing")
    name = f"model-{kind}.gguf"
    fingerprint = {
        "command": "pack",
        "source": source.digest(),
        "format": "gguf",
        "rest": rest,
        "torch": torch.__version__,
    }
    with OutputFolder.begin(out, fingerprint, restart=restart) as folder:
        if not folder.finished:
            if not folder.has(name):
                header = folder.work / "header"
                head = header_bytes(architecture, fields, plan, header)
                folder.write_chunks(name, _chunks(head, source, plan, kind, outer, progress))
                header.unlink(missing_ok=True)
            source.check_unchanged()
            facts = {
                "kind": "gguf",
                "type": kind,
                "bits": fmt.bits,
                "group_size": fmt.group_size,
                "symmetric": symmetric,
                "bits_per_weight": round(_bits(kind), 6),
                "codes_bits_per_weight": round(bits_per_weight(fmt.bits, fmt.group_size), 6),
            }
            folder.finish({**fingerprint, **facts}, {"elapsed_s": time.perf_counter() - start})
    file = out / name
    return GgufResult(file, kind, file.stat().st_size, time.perf_counter() - start)


def _bits(kind: str) -> float:
    return BYTES[kind] * 8 / BLOCK


def _check_sizes(source: Checkpoint, fmt: QuantFormat, rest: Rest) -> None:
    where = show(str(source.path))
    if fmt.group_size % BLOCK:
        raise InputError(
            f"{where} has groups of {fmt.group_size}: GGUF's blocks hold {BLOCK} weights, so the group must be a multiple of it."
        )
    if rest == "q8_0" and source.config.hidden_size % BLOCK:
        raise InputError(
            f"{where} has a hidden size of {source.config.hidden_size}, no multiple of {BLOCK}: choose f16 for the rest."
        )


def size_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this GGUF type."""
    count = math.prod(shape)
    if kind in BYTES:
        return count // BLOCK * BYTES[kind]
    return {"F32": count * 4, "F16": count * 2, "Q8_0": count // 32 * 34}[kind]


def plan_parts(source: Checkpoint, kind: str, outer: str) -> Iterator[Plan]:
    """The tensors in front of the blocks, those of each block, and those after them."""
    config = source.config
    matrix = (outer, (config.vocab_size, config.hidden_size))
    front: Plan = {EMBEDDING: matrix}
    if (factors := rope_factors(config)) is not None:
        front[ROPE] = ("F32", tuple(factors.shape))
    yield front
    for index in range(config.num_layers):
        yield _block_plan(source, index, kind)
    last: Plan = {FINAL_NORM: ("F32", (config.hidden_size,))}
    yield last if config.tie_embeddings else last | {HEAD: matrix}


def _block_plan(source: Checkpoint, index: int, kind: str) -> Plan:
    config, packed = source.config, source.packed_roles(index)
    plan: Plan = {
        block_name(index, NORMS[role]): ("F32", shape) for role, shape in norm_shapes(config).items()
    }
    shapes, biases = linear_shapes(config), bias_roles(config)
    for role, name in ROLES.items():
        if role in shapes:
            own = kind if role in packed else "F32" if role == "router" else "F16"
            plan[block_name(index, name)] = (own, shapes[role])
            if role in biases:
                plan[block_name(index, name, "bias")] = ("F32", shapes[role][:1])
    for part, name in EXPERTS.items():
        roles = [f"experts.{expert}.{part}" for expert in range(config.num_experts)]
        if not roles:
            continue
        if len({role in packed for role in roles}) > 1:
            raise InputError(
                f"block {index}: some experts' {part} are int4 and some float, which one stacked tensor of GGUF cannot hold."
            )
        own = kind if roles[0] in packed else "F16"
        plan[block_name(index, name)] = (own, (config.num_experts, *shapes[roles[0]]))
    return plan


def header_bytes(architecture: str, fields: Mapping[str, Any], plan: Plan, place: Path) -> bytes:
    """Magic, metadata and table of tensors, padded to the alignment; the package writes them to the file `place`."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(place, architecture)
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, (kind, shape) in plan.items():
        size = size_bytes(kind, shape)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, GGMLQuantizationType[kind])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        head = place.read_bytes()
    except OSError as error:
        raise write_failure(place, error) from error
    return head + b"\0" * (-len(head) % ALIGNMENT)


def _chunks(
    head: bytes,
    source: Checkpoint,
    plan: Plan,
    kind: str,
    outer: str,
    progress: Callable[[int, int], None],
) -> Iterator[bytes | memoryview]:
    """The whole file, in pieces."""
    yield head
    config = source.config
    yield from _aligned(EMBEDDING, _float_bytes(EMBEDDING, source.embedding(), outer), plan)
    if (factors := rope_factors(config)) is not None:
        yield from _aligned(ROPE, _float_bytes(ROPE, factors, "F32"), plan)
    for index in range(config.num_layers):
        made = _block_bytes(source, index, plan, kind)
        for name in _block_plan(source, index, kind):
            yield from _aligned(name, made.pop(name), plan)
        progress(index + 1, config.num_layers)
    yield from _aligned(FINAL_NORM, _float_bytes(FINAL_NORM, source.final_norm(), "F32"), plan)
    if not config.tie_embeddings:
        yield from _aligned(HEAD, _float_bytes(HEAD, source.lm_head(), outer), plan)


def _aligned(name: str, data: Tensor, plan: Plan) -> Iterator[bytes | memoryview]:
    flat = data.contiguous().view(-1).view(torch.uint8)
    expected = size_bytes(*plan[name])
    if flat.numel() != expected:
        raise RuntimeError(f"{name} has {flat.numel()} bytes, its header says {expected}")
    yield flat.numpy().data
    yield b"\0" * (-expected % ALIGNMENT)


def _block_bytes(source: Checkpoint, index: int, plan: Plan, kind: str) -> dict[str, Tensor]:
    """Name -> data of every tensor of a block."""
    config, fmt = source.config, source.config.quantization
    assert fmt is not None
    is_llama = architecture_of(config) == "llama"
    heads = {"q": config.num_heads, "k": config.num_kv_heads} if is_llama else {}
    made: dict[str, Tensor] = {}
    for role, norm in source.norms(index).items():
        name = block_name(index, NORMS[role])
        made[name] = _float_bytes(name, norm, "F32")

    def data(name: str, role: str, linear: Stored) -> Tensor:
        if role in heads:
            linear = _permuted(linear, heads[role])
        if "bias" in linear:
            bias = block_name(index, ROLES[role], "bias")
            if bias in plan:
                made[bias] = _float_bytes(bias, linear["bias"], "F32")
            elif bool(linear["bias"].any()):
                raise InputError(f"block {index}: {role} has a bias that llama.cpp has no name for.")
        if "words" in linear:
            return pack_blocks(linear, fmt.group_size, kind == "Q4_0")
        return _float_bytes(name, linear["weight"].t(), plan[name][0])

    linears = source.stored_linears(index, linear_shapes(config))
    for role, gguf_role in ROLES.items():
        if role in linears:
            name = block_name(index, gguf_role)
            made[name] = data(name, role, linears.pop(role))
    for part, gguf_role in EXPERTS.items():
        if config.num_experts:
            name = block_name(index, gguf_role)
            roles = [f"experts.{expert}.{part}" for expert in range(config.num_experts)]
            made[name] = torch.stack([data(name, role, linears.pop(role)) for role in roles])
    return made


def permute(tensor: Tensor, heads: int) -> Tensor:
    """Rows (heads * D, ...) from two halves (j, j + D / 2) of each head to llama.cpp's pairs (2j, 2j + 1)."""
    halves = tensor.view(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _permuted(linear: Stored, heads: int) -> Stored:
    """The output features of a linear in stored form, which stand last, in llama.cpp's order."""
    moved: Stored = {}
    for name, part in linear.items():
        if name == "words":
            codes = unpack_columns(part, SEQUENTIAL_ORDER).t().contiguous()
            moved[name] = pack_columns(permute(codes, heads).t(), SEQUENTIAL_ORDER)
        else:
            moved[name] = permute(part.t().contiguous() if part.dim() == 2 else part, heads).t()
    return moved


def _float_bytes(name: str, tensor: Tensor, kind: str) -> Tensor:
    """A float tensor as the GGUF type `kind`: F32, F16 or Q8_0."""
    if kind == "F32":
        return tensor.float().contiguous()
    if kind == "F16":
        return half_floats({name: tensor})[name].contiguous()
    from gguf import GGMLQuantizationType, quants

    packed = quants.quantize(tensor.float().contiguous().numpy(), GGMLQuantizationType.Q8_0)
    return torch.from_numpy(packed)
