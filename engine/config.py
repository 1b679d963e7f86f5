"""`EngineConfig`: every choice of the serving engine, checked once. Knows nothing of models or devices at hand."""

from dataclasses import dataclass
from typing import Literal

GIB = 1024**3


Dtype = Literal["auto", "float16", "bfloat16", "float32"]  # of the forward passes
KvMode = Literal[
    "dynamic", "static"
]  # where the scales of an int8 cache come from: each token, or the checkpoint


@dataclass(frozen=True)
class EngineConfig:
    """How a model is run. Defaults of the command line are read from here. Sizes in tokens unless the name says bytes.

    device "auto" is the first CUDA device, else the CPU; dtype "auto" is fp32 on the CPU and the checkpoint's on a GPU.
    The KV cache takes `cache_bytes` where given, else `cache_fraction` of the memory left after the weights.
    """

    device: str = "auto"
    dtype: Dtype = "auto"
    kv_bits: Literal[8, 16] = 16  # 16: the model's dtype; 8: int8 with scale and zero
    kv_mode: KvMode = "dynamic"
    block_size: int = 64  # tokens in one KV cache block
    cache_fraction: float = 0.9
    cache_bytes: int | None = None
    context_length: int | None = None  # None: the model's own limit
    max_batch: int = 128  # sequences that run at once
    max_step_tokens: int = 2048  # tokens of one step: the prefill chunk, with the decoding sequences
    cuda_graphs: bool = True
    graph_batches: tuple[int, ...] = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128)
    warm_up: bool = True  # on a GPU: capture all graphs and compile all kernels before the first request
    memory_cap_bytes: int | None = None  # upper limit of what torch allocates on the GPU
    tp: int = 1
    log_level: Literal["info", "warning"] = "info"  # of the notes that the engine's processes write to stderr
    seed: int = 0  # source of the seeds of requests that bring none

    def __post_init__(self) -> None:
        if self.kv_bits not in (8, 16):
            raise ValueError(f"kv_bits is {self.kv_bits}: expected 16 (the model's dtype) or 8 (int8).")
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size is {self.block_size}: expected a power of two.")
        if not 0.0 < self.cache_fraction <= 1.0:
            raise ValueError(
                f"cache_fraction is {self.cache_fraction}: expected a number above 0 and at most 1."
            )
        for name in ("cache_bytes", "context_length", "memory_cap_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: expected a positive number.")
        for name in ("max_batch", "max_step_tokens", "tp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1.")
        if not self.graph_batches or min(self.graph_batches) < 1:
            raise ValueError(f"graph_batches is {self.graph_batches}: expected sizes of at least 1.")
        if self.max_step_tokens < self.max_batch:
            raise ValueError(
                f"max_step_tokens is {self.max_step_tokens} and max_batch {self.max_batch}: a step needs room for "
                "one token of each running sequence; raise max_step_tokens or lower max_batch."
            )
