"""The forward pass against an independent one: tiny random models of every family, float32, 2 sequences of 40 tokens.

References as the families' own code computes them: transformers for Llama, Mistral, Qwen2, Qwen3 and Mixtral; InternLM and
InternLM2 are their weights mapped to Llama's; Qwen-1 is a short torch model written from its published code.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from convert.checkpoint import BlockWeights, LinearWeights
from convert.config import ModelConfig, RopeScaling
from engine.model.forward import Block, Model, block_forward, causal_attend
from engine.model.layers import why_unpacked

TOLERANCE = 1e-4  # absolute, on logits of size about 1: float32 sums in another order
LENGTH = 40

BASE = ModelConfig(
    family="llama",
    architecture="LlamaForCausalLM",
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=101,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_position=256,
    dtype="float32",
)
SCALINGS = {
    "linear": RopeScaling("linear", 4.0, 256),
    "dynamic": RopeScaling("dynamic", 2.0, 16),
    "yarn": RopeScaling("yarn", 4.0, 16),
    "yarn-factor": RopeScaling("yarn", 8.0, 32, attention_factor=1.25, beta_fast=16.0, beta_slow=2.0),
    "llama3": RopeScaling("llama3", 8.0, 32, low_freq_factor=1.0, high_freq_factor=4.0),
}
CONFIGS = {
    "llama": BASE,
    "llama-tied": replace(BASE, tie_embeddings=True, num_kv_heads=4),
    "llama-biases": replace(BASE, qkv_bias=True, o_bias=True, mlp_bias=True),
    "internlm": replace(BASE, qkv_bias=True, o_bias=True),  # its code is Llama's with these biases
    "mistral": replace(BASE, family="mistral", architecture="MistralForCausalLM", sliding_window=7),
    "qwen2": replace(BASE, family="qwen2", architecture="Qwen2ForCausalLM", qkv_bias=True),
    "qwen2-window": replace(
        BASE,
        family="qwen2",
        architecture="Qwen2ForCausalLM",
        qkv_bias=True,
        sliding_window=9,
        window_layers=(1, 2),
    ),
    "qwen3": replace(BASE, family="qwen3", architecture="Qwen3ForCausalLM", qk_norm=True, head_dim=32),
    "mixtral": replace(
        BASE,
        family="mixtral",
        architecture="MixtralForCausalLM",
        num_experts=4,
        experts_per_token=2,
        sliding_window=11,
    ),
}
for _name, _scaling in SCALINGS.items():
    CONFIGS[f"llama-{_name}"] = replace(
        BASE, rope_scaling=_scaling, max_position=16 if _scaling.kind == "dynamic" else 256
    )


def hf_model(config: ModelConfig) -> Any:
    """A transformers model of the same shape, random weights wide enough that every part moves the logits."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind in ("yarn", "llama3"):
            rope["original_max_position_embeddings"] = scaling.original_max_position
        if scaling.kind == "llama3":
            rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        if scaling.kind == "yarn":
            rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
            if scaling.attention_factor is not None:
                rope["attention_factor"] = scaling.attention_factor
    keys: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "sliding_window": config.sliding_window,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if config.family == "llama":
        keys |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    if config.window_layers is not None:
        keys |= {"use_sliding_window": True, "max_window_layers": min(config.window_layers)}
    if config.num_experts:
        keys |= {"num_local_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token}
    architecture = getattr(transformers, config.architecture)
    torch.manual_seed(0)
    model = architecture(architecture.config_class(**keys, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.3 if name.endswith("bias") else parameter.shape[-1] ** -0.5)
    return model


def from_transformers(model: Any, config: ModelConfig) -> Model:
    """Our model on the tensors of a transformers one, by its module names."""
    state: dict[str, Tensor] = {name: value.detach() for name, value in model.state_dict().items()}
    blocks = []
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        linears = {
            role: LinearWeights(
                state[f"{prefix}{part}.{role}_proj.weight"], state.get(f"{prefix}{part}.{role}_proj.bias")
            )
            for part, roles in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
            for role in roles
            if not (config.num_experts and part == "mlp")
        }
        for expert in range(config.num_experts):
            gate, up = state[f"{prefix}mlp.experts.gate_up_proj"][expert].chunk(2)
            linears[f"experts.{expert}.gate"] = LinearWeights(gate, None)
            linears[f"experts.{expert}.up"] = LinearWeights(up, None)
            linears[f"experts.{expert}.down"] = LinearWeights(
                state[f"{prefix}mlp.experts.down_proj"][expert], None
            )
        if config.num_experts:
            linears["router"] = LinearWeights(state[f"{prefix}mlp.gate.weight"], None)
        norms = {"attn_norm": state[f"{prefix}input_layernorm.weight"]}
        norms["mlp_norm"] = state[f"{prefix}post_attention_layernorm.weight"]
        if config.qk_norm:
            norms |= {f"{x}_norm": state[f"{prefix}self_attn.{x}_norm.weight"] for x in "qk"}
        blocks.append(BlockWeights(index, linears, norms))
    return assemble(
        config,
        state["model.embed_tokens.weight"],
        blocks,
        state["model.norm.weight"],
        state["lm_head.weight"],
    )


def assemble(
    config: ModelConfig, embedding: Tensor, blocks: list[BlockWeights], norm: Tensor, head: Tensor
) -> Model:
    built = [Block(config, weights, torch.float32, "cpu") for weights in blocks]
    return Model(config, embedding, built, norm, head)


def logits_of(model: Model, ids: Tensor) -> Tensor:
    """ids (B, L) -> (B, L, V)."""
    batch, length = ids.shape
    positions = torch.arange(length).repeat(batch)
    attend = causal_attend(batch, length, model.config)
    return model(ids.flatten(), positions, attend).view(batch, length, -1)


def greedy(model: Model, prompt: Tensor, count: int) -> list[int]:
    """`count` tokens after prompt (L,), each from a full pass; prompt_lengths make it equal to decoding with a cache."""
    ids = prompt
    for _ in range(count):
        length = len(ids)
        lengths = torch.full((length,), len(prompt))
        out = model(
            ids,
            torch.arange(length),
            causal_attend(1, length, model.config),
            lengths,
            torch.tensor([length - 1]),
        )
        ids = torch.cat((ids, out.argmax(-1)))
    return ids[len(prompt) :].tolist()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(BASE.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_and_greedy_text_equal_transformers(name: str, ids: Tensor) -> None:
    config = CONFIGS[name]
    reference = hf_model(config)
    ours = from_transformers(reference, config)
    expected = reference(ids).logits
    assert expected.std() > 0.3  # a model that says nothing would agree with everything
    assert (logits_of(ours, ids) - expected).abs().max() < TOLERANCE

    prompt = ids[0, :12]
    text = reference.generate(prompt[None], max_new_tokens=64, do_sample=False)[0, 12:].tolist()
    assert len(text) == 64
    assert greedy(ours, prompt, 64) == text


@pytest.mark.parametrize("change", ["rope_theta", "norm_eps", "rope_scaling", "sliding_window", "qk_norm"])
@torch.no_grad()
def test_the_comparison_can_fail(change: str, ids: Tensor) -> None:
    """Each of these read wrongly moves the logits by far more than the tolerance."""
    config = CONFIGS["qwen3"] if change == "qk_norm" else BASE
    reference = hf_model(config)
    wrong = {
        "rope_theta": 9000.0,
        "norm_eps": 1e-2,
        "rope_scaling": SCALINGS["linear"],
        "sliding_window": 39,
        "qk_norm": False,
    }
    ours = from_transformers(reference, replace(config, **{change: wrong[change]}))
    assert (logits_of(ours, ids) - reference(ids).logits).abs().max() > 10 * TOLERANCE


@torch.no_grad()
def test_internlm2_grouped_rows_are_llama(ids: Tensor) -> None:
    """wqkv holds for each KV head its query heads, then k, then v; ungrouped, the model is a Llama."""
    config = replace(BASE, family="internlm2", architecture="InternLM2ForCausalLM")
    reference = hf_model(BASE)
    ours = from_transformers(reference, BASE)
    group, heads, size = config.query_group, config.num_kv_heads, config.head_dim
    blocks = []
    for index, layer in enumerate(reference.model.layers):
        attention = layer.self_attn
        q = attention.q_proj.weight.detach().view(heads, group, size, -1)
        k, v = (p.weight.detach().view(heads, 1, size, -1) for p in (attention.k_proj, attention.v_proj))
        wqkv = torch.cat((q, k, v), dim=1).flatten(0, 2)  # as InternLM2 stores it
        split = wqkv.view(heads, group + 2, size, -1)
        rows = {"q": split[:, :group], "k": split[:, -2], "v": split[:, -1]}
        linears = {role: LinearWeights(r.reshape(-1, config.hidden_size), None) for role, r in rows.items()}
        linears["o"] = LinearWeights(attention.o_proj.weight.detach(), None)
        for role in ("gate", "up", "down"):
            linears[role] = LinearWeights(getattr(layer.mlp, f"{role}_proj").weight.detach(), None)
        norms = {
            "attn_norm": layer.input_layernorm.weight.detach(),
            "mlp_norm": layer.post_attention_layernorm.weight.detach(),
        }
        blocks.append(BlockWeights(index, linears, norms))
    grouped = assemble(config, ours.embedding, blocks, ours.final_norm, ours.lm_head)
    assert (logits_of(grouped, ids) - reference(ids).logits).abs().max() < TOLERANCE


class Qwen1:
    """Qwen-1 from its published code: c_attn in thirds, gate is w2, NTK alpha of the prompt, log-n attention."""

    def __init__(self, config: ModelConfig, seq_length: int, dynamic_ntk: bool, logn: bool) -> None:
        self.config, self.seq_length, self.dynamic_ntk, self.logn = config, seq_length, dynamic_ntk, logn
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

        hidden, inner = config.hidden_size, config.intermediate_size
        self.wte, self.head, self.ln_f = (
            normal(config.vocab_size, hidden),
            normal(config.vocab_size, hidden),
            torch.ones(hidden),
        )
        self.layers = [
            {
                "c_attn": normal(3 * hidden, hidden),
                "c_attn.bias": normal(3 * hidden),
                "c_proj": normal(hidden, hidden),
                "w1": normal(inner, hidden),
                "w2": normal(inner, hidden),
                "mlp.c_proj": normal(hidden, inner),
                "ln_1": 1 + normal(hidden),
                "ln_2": 1 + normal(hidden),
            }
            for _ in range(config.num_layers)
        ]

    def alpha(self, prompt: int) -> float:
        if not self.dynamic_ntk:
            return 1.0
        return max(2 ** math.ceil(math.log(prompt / self.seq_length, 2) + 1) - 1, 1)

    def __call__(self, ids: Tensor, prompt: int) -> Tensor:
        config = self.config
        dim = config.head_dim
        base = config.rope_theta * self.alpha(prompt) ** (dim / (dim - 2))
        inverse = 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)
        angle = torch.outer(torch.arange(len(ids)).float(), inverse)
        angle = torch.cat((angle, angle), -1)[:, None]
        logn = [math.log(i, self.seq_length) if i > self.seq_length else 1 for i in range(1, len(ids) + 1)]

        def norm(x: Tensor, weight: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.norm_eps) * weight

        def rotate(x: Tensor) -> Tensor:
            half = torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), -1)
            return x * angle.cos() + half * angle.sin()

        x = self.wte[ids]
        future = torch.ones(len(ids), len(ids)).triu(1).bool()
        for layer in self.layers:
            mixed = F.linear(norm(x, layer["ln_1"]), layer["c_attn"], layer["c_attn.bias"])
            q, k, v = (part.view(len(ids), -1, dim) for part in mixed.split(config.hidden_size, dim=-1))
            q, k = rotate(q), rotate(k)
            if self.logn:
                q = q * torch.tensor(logn)[:, None, None]
            scores = torch.einsum("ihd,jhd->hij", q, k) / dim**0.5
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            x = x + torch.einsum("hij,jhd->ihd", weights, v).flatten(1) @ layer["c_proj"].T
            h = norm(x, layer["ln_2"])
            x = x + (h @ layer["w1"].T * F.silu(h @ layer["w2"].T)) @ layer["mlp.c_proj"].T
        return norm(x, self.ln_f) @ self.head.T

    def ours(self) -> Model:
        scaling = RopeScaling("qwen_ntk", 1.0, self.seq_length) if self.dynamic_ntk else None
        config = replace(
            self.config,
            rope_scaling=scaling,
            logn_attention=self.logn,
            max_position=1024 if scaling else self.seq_length,
        )
        blocks = []
        for index, layer in enumerate(self.layers):
            thirds = zip("qkv", layer["c_attn"].chunk(3), layer["c_attn.bias"].chunk(3), strict=True)
            linears = {role: LinearWeights(weight, bias) for role, weight, bias in thirds}
            names = (("o", "c_proj"), ("gate", "w2"), ("up", "w1"), ("down", "mlp.c_proj"))
            linears |= {role: LinearWeights(layer[name], None) for role, name in names}
            blocks.append(
                BlockWeights(index, linears, {"attn_norm": layer["ln_1"], "mlp_norm": layer["ln_2"]})
            )
        return assemble(config, self.wte, blocks, self.ln_f, self.head)


@pytest.mark.parametrize("prompt", [12, 16, 17, 40, 80])
@pytest.mark.parametrize(
    ("dynamic_ntk", "logn"), [(False, False), (True, False), (True, True), (False, True)]
)
@torch.no_grad()
def test_qwen1(prompt: int, dynamic_ntk: bool, logn: bool) -> None:
    """seq_length 16: prompts within it, at its edge, and with NTK alpha 3 (17 tokens), 7 (40) and 15 (80)."""
    config = replace(BASE, family="qwen", architecture="QWenLMHeadModel", num_kv_heads=4, qkv_bias=True)
    reference = Qwen1(config, 16, dynamic_ntk, logn)
    ours = reference.ours()
    ids = torch.randint(config.vocab_size, (prompt,), generator=torch.Generator().manual_seed(2))
    assert (logits_of(ours, ids[None])[0] - reference(ids, prompt)).abs().max() < TOLERANCE

    text = ids
    for _ in range(64):
        text = torch.cat((text, reference(text, prompt)[-1:].argmax(-1)))
    assert greedy(ours, ids, 64) == text[prompt:].tolist()


def test_gradients_reach_every_weight(ids: Tensor) -> None:
    """Learned rounding differentiates a block with weights of its own; forward values equal the inference block's."""
    config = CONFIGS["qwen3"]
    model = from_transformers(hf_model(config), config)
    reference = hf_model(config)
    weights = _require_grad(reference, config)
    x = model.embed(ids.flatten()).requires_grad_()
    positions = torch.arange(LENGTH).repeat(2)
    attend = causal_attend(2, LENGTH, config)
    out = block_forward(x, positions, weights, config, attend)
    assert torch.allclose(out, model.blocks[0](x, positions, attend), atol=1e-5)
    out.square().mean().backward()
    tensors: list[Tensor] = [x, *(part.weight for part in weights.linears.values()), *weights.norms.values()]  # type: ignore[list-item]
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in tensors)


def _require_grad(reference: Any, config: ModelConfig) -> BlockWeights:
    layer = reference.model.layers[0]
    parts: dict[str, Callable[[str], Any]] = {role: layer.self_attn.get_submodule for role in "qkvo"} | {
        role: layer.mlp.get_submodule for role in ("gate", "up", "down")
    }
    linears = {
        role: LinearWeights(find(f"{role}_proj").weight.detach().clone().requires_grad_(), None)
        for role, find in parts.items()
    }
    norms = {
        "attn_norm": layer.input_layernorm.weight,
        "mlp_norm": layer.post_attention_layernorm.weight,
        "q_norm": layer.self_attn.q_norm.weight,
        "k_norm": layer.self_attn.k_norm.weight,
    }
    return BlockWeights(
        0, linears, {role: norm.detach().clone().requires_grad_() for role, norm in norms.items()}
    )


@pytest.mark.parametrize(
    ("dtype", "group_size", "device", "why"),
    [
        (torch.float16, 128, "cuda", ""),
        (torch.float32, 128, "cuda", "no kernel takes float32"),
        (torch.bfloat16, 16, "cuda", "no kernel takes group size 16"),
        (torch.float32, 128, "cpu", "on the CPU"),
    ],
)
def test_where_int4_weights_become_floats(dtype: torch.dtype, group_size: int, device: str, why: str) -> None:
    assert why_unpacked(group_size, dtype, device) == why
