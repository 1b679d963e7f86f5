"""`ModelConfig`: a foreign config.json becomes our own type here, at the border. Nothing else reads foreign configs."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

# qwen_ntk: Qwen-1's own rule, its base grows with the power of two that covers the prompt
RopeKind = Literal["linear", "dynamic", "yarn", "llama3", "longrope", "qwen_ntk"]
Method = Literal[
    "awq", "compressed-tensors", "gptq", "mlx"
]  # layouts of packed linears: convert.linear_layouts
Activation = Literal["silu", "gelu_tanh"]
# Where a block norms its hidden states. "before": what each half reads (Llama). "around": what each half reads and what it
# gives (Gemma 2, GLM-4). "after": what each half gives alone (OLMo 2).
NormPlacement = Literal["before", "around", "after"]


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
    short_factors: tuple[float, ...] = ()  # longrope: divisors of the frequencies within the original context
    long_factors: tuple[float, ...] = ()  # longrope: the same beyond it


@dataclass(frozen=True)
class Router:
    """How the experts of a token are chosen and weighted.

    `scores` of all experts, of which `groups` equal groups compete first: only the experts of the best `top_groups` groups
    (by the sum of their two best scores) are eligible. The weights of the chosen are made to sum to 1 where `renormalize`
    says so, and multiplied by `scale`. `corrected`: a bias for each expert is added for the choice, not in the weight.
    """

    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    corrected: bool = False


@dataclass(frozen=True)
class Tree:
    """Where a checkpoint that holds more than a language model keeps it: names of tensors, and the key of config.json."""

    architecture: str
    block: str  # with {i}
    embedding: str
    final_norm: str
    lm_head: str
    config_key: str | None = None  # the text model's part of config.json; None: the whole of it


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
    """A decoder-only transformer with RMSNorm, RoPE, gated MLP or experts, and grouped-query attention. Sizes in elements.

    A mixture may have some dense layers: `of_layer` gives what one layer computes.
    """

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
    qk_norm: bool = False  # RMSNorm of q and k before RoPE
    qk_norm_width: Literal["head", "all"] = (
        "head"  # what it runs over: each head, or all heads together (OLMo 2)
    )
    norm_placement: NormPlacement = "before"
    norm_offset: float = 0.0  # 1 where files hold norm weights minus 1 (Gemma)
    activation: Activation = "silu"
    rotary_dim: int | None = None  # channels of a head that RoPE turns, the first ones in files; None: all
    rotary_interleaved: bool = False  # files hold RoPE pairs next to each other (GLM-4)
    local_rope_theta: float | None = None  # RoPE base of the layers with a window, without scaling (Gemma 3)
    attention_scale: float | None = None  # factor on the attention scores; None: head_dim ** -0.5
    attention_softcap: float | None = None  # scores become cap * tanh(scores / cap)
    logit_softcap: float | None = None
    logit_scale: float = 1.0  # factors on logits, embedding and what each half of a block adds
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logn_attention: bool = False  # Qwen-1: q times log_{seq_length}(position) beyond the training length
    num_experts: int = 0
    experts_per_token: int = 0
    expert_intermediate_size: int = 0  # of each expert; 0: intermediate_size
    shared_intermediate_size: int = 0  # of the expert that every token goes through; 0: there is none
    shared_gated: bool = False  # its output is multiplied by the sigmoid of a product with one row
    router: Router = Router()
    dense_layers: tuple[int, ...] = ()  # layers of a mixture that have a plain MLP
    tree: Tree | None = None
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

    @property
    def expert_size(self) -> int:
        """Intermediate size of an expert."""
        return self.expert_intermediate_size or self.intermediate_size

    @property
    def softmax_scale(self) -> float:
        """Factor on the attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def of_layer(self, index: int) -> "ModelConfig":
        """What layer `index` computes: itself, or the same without experts where the layer is dense."""
        return _dense(self) if self.num_experts and index in self.dense_layers else self


@lru_cache(maxsize=16)
def _dense(config: ModelConfig) -> ModelConfig:
    return replace(config, num_experts=0, experts_per_token=0, shared_intermediate_size=0, dense_layers=())
