"""`ModelConfig`: a foreign config.json becomes our own type here, at the border. Nothing else reads foreign configs."""

from dataclasses import dataclass
from typing import Literal

# qwen_ntk: Qwen-1's own rule, its base grows with the power of two that covers the prompt
RopeKind = Literal["linear", "dynamic", "yarn", "llama3", "qwen_ntk"]
Method = Literal[
    "awq", "compressed-tensors", "gptq", "mlx"
]  # layouts of packed linears: convert.linear_layouts


@dataclass(frozen=True)
class RopeScaling:
    """A change of the RoPE frequencies for longer contexts. `original_max_position` in tokens; factors without unit."""

    kind: RopeKind
    factor: float
    original_max_position: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class QuantFormat:
    """How the linears of a checkpoint are stored. `bits` as the manifest says: int3 and int2 codes lie in nibbles.

    `modules_to_not_convert` may hold names, endings of names, or roles. `zero_offset` is what stored zero points lack (GPTQ
    v1: 1). `symmetric`: the files state that every zero point is 8.
    """

    bits: int
    group_size: int
    modules_to_not_convert: tuple[str, ...] = ()
    method: Method = "awq"
    symmetric: bool = False
    zero_offset: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with RMSNorm, RoPE, gated SiLU MLP and grouped-query attention. Sizes in elements."""

    family: str
    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_position: int
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # tokens that a query sees, itself included; None: all
    window_layers: tuple[int, ...] | None = (
        None  # layers with the window; None: all, where sliding_window is set
    )
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim of q and k, before RoPE
    logn_attention: bool = False  # Qwen-1: q times log_{seq_length}(position) beyond the training length
    num_experts: int = 0
    experts_per_token: int = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    quantization: QuantFormat | None = None
    padded_from: tuple[int, int, int] | None = (
        None  # (hidden, heads, kv heads) before `--pad`, for the record
    )

    @property
    def query_group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads
