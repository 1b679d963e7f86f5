# mypy: allow-any-expr, disable-error-code="no-any-return,import-not-found"
"""Published products of int4 experts beside ours, each given the same codes, scales and zeros: humming and vllm's Triton kernel.

Both take token-expert pairs that were sorted and padded beforehand, for which each brings a kernel of its own; here that work is done
before the clock starts, to their advantage. SiLU and the weighted sum are kernels of ours for them too.
"""

import ast
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.int4 import Quantized
from kernels.moe.combine import launch_sum
from kernels.moe.sorting import sort_pairs

Product = Callable[[Tensor, Tensor, Tensor], Tensor]
Parts = tuple[list[Quantized], list[Quantized], list[Quantized]]


def peers_of(parts: Parts, vllm: Path | None) -> dict[str, Product]:
    """Name -> product of those that can be had here; the others are named on stderr."""
    makers: dict[str, Callable[[], Product]] = {"humming": lambda: Humming(parts)}
    if vllm is not None:
        makers["vllm triton"] = lambda: VllmTriton(parts, vllm)
    found: dict[str, Product] = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except Exception as error:
            print(f"{name} is left out: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
    return found


def gate_and_up(parts: Parts) -> list[Quantized]:
    """gate's rows, then up's, of every expert."""
    names = ("codes", "scales", "zeros")
    return [
        Quantized(*(torch.cat([getattr(gate, name), getattr(up, name)]) for name in names), gate.group_size)
        for gate, up in zip(parts[0], parts[1], strict=True)
    ]


class PaddedSort:
    """Pairs sorted by expert and padded to whole blocks, remembered for each tensor of choices."""

    def __init__(self, experts: int) -> None:
        self.experts, self.made = experts, {}

    def __call__(self, chosen: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """sorted ids (padded with A), expert of each block, number of ids with padding."""
        key = (chosen.data_ptr(), block)
        if key not in self.made:
            pairs, count = sort_pairs(chosen, self.experts, block), chosen.numel()
            used = pairs.expert >= 0
            place = pairs.first[used][:, None] + torch.arange(block, device=chosen.device)
            live = place < pairs.end[pairs.expert[used].long()][:, None]
            ids = torch.where(live, pairs.order[place.clamp(max=count - 1).long()], count).flatten().int()
            total = torch.tensor([len(ids)], dtype=torch.int32, device=chosen.device)
            self.made[key] = (ids, pairs.expert[used].contiguous(), total)
        return self.made[key]


def silu_halves(product: Tensor) -> Tensor:
    gate, up = product.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


class Humming:
    """humming's products with its own choice of tiles, in its indexed form."""

    def __init__(self, parts: Parts) -> None:
        self.sort = PaddedSort(len(parts[2]))
        self.layers = [self._layer(gate_and_up(parts)), self._layer(parts[2])]

    @staticmethod
    def _layer(weights: list[Quantized]) -> Any:
        from humming import ops
        from humming.layer import HummingLayer, HummingLayerMethod

        rows, cols = weights[0].shape
        config = {"dtype": "uint4", "group_size": 128, "has_zero_point": True, "scale_dtype": "float16"}
        layer: Any = HummingLayer(
            shape_n=rows,
            shape_k=cols,
            torch_dtype=torch.float16,
            weight_config=config,
            num_experts=len(weights),
        ).cuda()
        zeros = torch.stack(
            [ops.pack_weight(w.zeros.t().contiguous().int(), 4).t().contiguous() for w in weights]
        )
        codes = torch.stack([ops.pack_weight(w.codes.int().contiguous(), 4) for w in weights])
        scales = torch.stack([w.scales for w in weights])
        layer.load_from_tensors({"weight": codes, "weight_scale": scales, "zero_point": zeros})
        layer.transform()
        layer.tuning = HummingLayerMethod.get_default_tuning_configs(layer, gemm_type="indexed")
        return layer

    def _block(self, which: int, tokens: int) -> int:
        """Rows of a block in the tile that humming takes for so many tokens."""
        for low, high, config in self.layers[which].tuning:
            if low < tokens <= high:
                return int(config["block_shape"][0])
        raise ValueError(f"no tile of humming for {tokens} tokens")

    def _product(self, which: int, x: Tensor, chosen: Tensor, topk: int, tokens: int) -> Tensor:
        ids, expert, total = self.sort(chosen, self._block(which, tokens))
        layer = self.layers[which]
        return layer(
            x, sorted_ids=ids, expert_ids=expert, num_tokens_padded=total, top_k=topk, valid_shape_m=tokens,
            compute_config=json.dumps({"gemm_type": "indexed"}), tuning_config=layer.tuning,
        )  # fmt: skip

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        tokens, topk = chosen.shape
        inner = silu_halves(self._product(0, x, chosen, topk, tokens).view(tokens * topk, -1))
        parts = (
            self._product(1, inner, chosen, 1, tokens * topk).view(tokens * topk, -1)
            * weights.view(-1, 1).half()
        )
        out = torch.empty_like(x)
        launch_sum(parts, out, topk)
        return out


class VllmTriton:
    """vllm's `fused_moe_kernel_gptq_awq`, taken from its file, with the block sizes that its own launcher chooses."""

    def __init__(self, parts: Parts, path: Path) -> None:
        self.kernel = extract(path, "fused_moe_kernel_gptq_awq")
        self.sort = PaddedSort(len(parts[2]))
        self.weights = [self._pack(gate_and_up(parts)), self._pack(parts[2])]

    @staticmethod
    def _pack(weights: list[Quantized]) -> tuple[Tensor, Tensor, Tensor]:
        """codes (E, N, K / 2), scales (E, N, G), zeros (E, N / 2, G): two codes a byte along K, two zeros along N."""
        codes = torch.stack([w.codes[:, 0::2] | w.codes[:, 1::2] << 4 for w in weights])
        zeros = torch.stack([w.zeros[0::2] | w.zeros[1::2] << 4 for w in weights])
        return codes, torch.stack([w.scales for w in weights]), zeros

    def _product(
        self, which: int, x: Tensor, chosen: Tensor, topk: int, tokens: int, factor: Tensor | None
    ) -> Tensor:
        import triton
        import triton.language as tl

        codes, scales, zeros = self.weights[which]
        block = 16 if tokens <= 20 else 32 if tokens <= 40 else 64
        wide, deep = (32, 64) if tokens == 1 else (64, 32)
        ids, expert, total = self.sort(chosen, block)
        out = torch.empty(chosen.numel(), codes.shape[1], dtype=torch.float16, device=x.device)
        blocks = min(len(expert), x.shape[0] * topk) if x.shape[0] < block else len(expert)
        self.kernel[(blocks * triton.cdiv(codes.shape[1], wide),)](
            x, codes, out, scales, zeros, factor, ids, expert, total, codes.shape[1], x.shape[1], blocks * block,
            chosen.numel(), x.stride(0), 1, codes.stride(0), 1, codes.stride(1), out.stride(0), 1,
            scales.stride(0), 1, scales.stride(1), zeros.stride(0), 1, zeros.stride(1),
            block_k_diviable=x.shape[1] % deep == 0, group_size=128, BLOCK_SIZE_M=block, BLOCK_SIZE_N=wide, BLOCK_SIZE_K=deep,
            GROUP_SIZE_M=1, SPLIT_K=1, MUL_ROUTED_WEIGHT=factor is not None, top_k=topk, compute_type=tl.float16, has_zp=True,
            use_int4_w4a16=True, use_int8_w8a16=False,
        )  # fmt: skip
        return out

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        tokens, topk = chosen.shape
        inner = silu_halves(self._product(0, x, chosen, topk, tokens, None))
        parts = self._product(1, inner, chosen, 1, tokens, weights.reshape(-1).contiguous())
        out = torch.empty_like(x)
        launch_sum(parts, out, topk)
        return out


def extract(path: Path, name: str) -> Any:
    """One kernel of a Python file, and the kernels of that file that it calls, without importing the rest."""
    source = path.read_text()
    wanted = {name, "write_zeros_to_output"}
    nodes = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name in wanted]
    text = "import triton\nimport triton.language as tl\n\n" + "\n\n".join(
        "@triton.jit\n" + (ast.get_source_segment(source, node) or "") for node in nodes
    )
    place = path.with_name("extracted_kernels.py")
    place.write_text(text)
    spec = importlib.util.spec_from_file_location("extracted_kernels", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
