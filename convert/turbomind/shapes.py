"""Which weight files a TurboMind workspace has, and the shape and type of each: they have no header that would say so.

K in features, N out features of one rank, V' vocabulary padded to a multiple of tp.
"""

from collections.abc import Iterator

import torch

from convert.turbomind.packing import GROUP_SIZE, Packing

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]  # file name -> shape, dtype


def all_shapes(packing: Packing, kv_int8: bool = False) -> Shapes:
    """Every weight file. `kv_int8`: with the parameters of a static int8 KV cache."""
    shapes = embedding_shapes(packing) | output_shapes(packing) | norm_shape(packing)
    for index in range(packing.config.num_layers):
        shapes |= block_shapes(packing, index)
    return shapes | (kv_shapes(packing) if kv_int8 else {})


def padded_vocabulary(packing: Packing) -> int:
    """V'."""
    return -(-packing.config.vocab_size // packing.tp) * packing.tp


def norm_shape(packing: Packing) -> Shapes:
    return {"norm.weight": ((packing.config.hidden_size,), packing.dtype)}


def embedding_shapes(packing: Packing) -> Shapes:
    """The embedding; dialect 0.6.5 cuts its columns among the ranks."""
    rows, hidden, tp = padded_vocabulary(packing), packing.config.hidden_size, packing.tp
    if packing.dialect == "0.1":
        return {"tok_embeddings.weight": ((rows, hidden), packing.dtype)}
    return {f"tok_embeddings.{rank}.weight": ((rows, hidden // tp), packing.dtype) for rank in range(tp)}


def output_shapes(packing: Packing) -> Shapes:
    """The matrix of the logits; dialect 0.6.5 cuts its rows among the ranks."""
    rows, hidden, tp = padded_vocabulary(packing), packing.config.hidden_size, packing.tp
    if packing.dialect == "0.1":
        return {"output.weight": ((rows, hidden), packing.dtype)}
    return {f"output.{rank}.weight": ((rows // tp, hidden), packing.dtype) for rank in range(tp)}


def kv_shapes(packing: Packing) -> Shapes:
    """Four floats for each block and rank, of a static int8 KV cache."""
    layers, ranks = range(packing.config.num_layers), range(packing.tp)
    return {
        f"layers.{i}.past_kv_scale.{rank}.weight": ((4,), torch.float32) for i in layers for rank in ranks
    }


def block_shapes(packing: Packing, index: int) -> Shapes:
    """The files of block `index`."""
    config = packing.config
    prefix = f"layers.{index}."
    shapes: Shapes = {
        f"{prefix}{name}.weight": ((config.hidden_size,), packing.dtype)
        for name in ("attention_norm", "ffn_norm")
    }
    if config.num_experts:
        shapes[f"{prefix}moe_ffn.gate.weight"] = ((config.hidden_size, config.num_experts), packing.dtype)
    for module, (rows, cols), biased in block_modules(packing, prefix):
        for rank in range(packing.tp):
            for part, kind in part_shapes(packing, rows, cols, biased).items():
                shapes[f"{module}.{rank}.{part}"] = kind
    return shapes


def block_modules(packing: Packing, prefix: str) -> Iterator[tuple[str, tuple[int, int], bool]]:
    """(module, (N, K) of one rank, whether it has a bias) of the linears of a block."""
    config = packing.config
    hidden, inner = config.hidden_size, packing.intermediate_size // packing.tp
    query_rows, kv_rows = packing.rank_rows
    yield prefix + "attention.w_qkv", (query_rows + 2 * kv_rows, hidden), packing.attn_bias
    yield prefix + "attention.wo", (hidden, query_rows), packing.attn_bias
    experts = range(config.num_experts)
    for mlp in [f"moe_ffn.experts.{e}." for e in experts] if experts else ["feed_forward."]:
        if packing.fuses_gate_up:
            yield prefix + mlp + "w13", (2 * inner, hidden), False
        else:
            yield prefix + mlp + "w1", (inner, hidden), False
            yield prefix + mlp + "w3", (inner, hidden), False
        yield prefix + mlp + "w2", (hidden, inner), False


def part_shapes(packing: Packing, rows: int, cols: int, biased: bool) -> Shapes:
    """The files of one linear of one rank, by the end of their names."""
    groups = cols // GROUP_SIZE
    shapes: Shapes
    if packing.weight_type != "int4":
        shapes = {"weight": ((cols, rows), packing.dtype)}
    elif packing.dialect == "0.1":
        tiles = (cols // 32, rows // 32, 128)
        shapes = {"qweight": (tiles, torch.int32), "scales_zeros": ((groups, rows), torch.int32)}
    else:
        shapes = {"qweight": ((cols, rows // 8), torch.int32)}
        shapes |= {name: ((groups, rows), torch.float16) for name in ("scales", "zeros")}
    return shapes | ({"bias": ((rows,), packing.dtype)} if biased else {})
