"""Reading Hugging Face folders: names of every family, fused tensors, shards, and what is said about odd ones."""

import family_models
import pytest
import torch
import transformers
from tiny_models import CONFIGS, DIM, HEADS, KV, LAYERS, random_tensors, write_model

from convert.checkpoint import LinearWeights
from convert.families.fused import join_stored, split_stored
from convert.families.rows import FAMILIES
from convert.families.table import family_of
from convert.readers import open_checkpoint
from kernels.int4 import quantize


def test_every_family_of_the_table_is_tested() -> None:
    assert {family.name for family in FAMILIES} == set(CONFIGS) | set(family_models.MODELS)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_tensor_is_read_under_its_role(family: str, tmp_path) -> None:
    tensors = write_model(tmp_path / "m", family)
    ckpt = open_checkpoint(tmp_path / "m")
    assert ckpt.kind == "hf" and ckpt.config.family == family and ckpt.config.dtype == "float16"
    used = 0
    for i in range(LAYERS):
        block = ckpt.block(i)
        for linear in block.linears.values():
            used += linear.weight.numel() + (0 if linear.bias is None else linear.bias.numel())
        used += sum(norm.numel() for norm in block.norms.values())
    used += ckpt.embedding().numel() + ckpt.final_norm().numel()
    if not ckpt.config.tie_embeddings:
        used += ckpt.lm_head().numel()
    assert used == sum(tensor.numel() for tensor in tensors.values())  # nothing left out, nothing read twice


PUBLISHED = {  # role -> tensor of block 1, as the families' own code names them
    "llama": {"gate": "model.layers.1.mlp.gate_proj", "o": "model.layers.1.self_attn.o_proj"},
    "internlm2": {
        "gate": "model.layers.1.feed_forward.w1",
        "up": "model.layers.1.feed_forward.w3",
        "down": "model.layers.1.feed_forward.w2",
        "o": "model.layers.1.attention.wo",
    },
    "qwen": {
        "gate": "transformer.h.1.mlp.w2",
        "up": "transformer.h.1.mlp.w1",
        "down": "transformer.h.1.mlp.c_proj",
    },
    "mixtral": {
        "router": "model.layers.1.block_sparse_moe.gate",
        "experts.2.gate": "model.layers.1.block_sparse_moe.experts.2.w1",
        "experts.2.up": "model.layers.1.block_sparse_moe.experts.2.w3",
        "experts.2.down": "model.layers.1.block_sparse_moe.experts.2.w2",
    },
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_roles_are_the_published_tensors(family: str, tmp_path) -> None:
    tensors = write_model(tmp_path / "m", family)
    block = open_checkpoint(tmp_path / "m").block(1)
    for role, name in PUBLISHED[family].items():
        assert torch.equal(block.linears[role].weight, tensors[name + ".weight"]), role


def test_grouped_wqkv_row_by_row(tmp_path) -> None:
    """InternLM2: for each KV head its query heads, its key, its value. Rows are numbered to follow each one."""
    tensors = random_tensors("internlm2")
    rows = (HEADS + 2 * KV) * DIM
    numbered = torch.arange(rows, dtype=torch.float16)[:, None].expand(rows, 64).contiguous()
    for name in tensors:
        if name.endswith("wqkv.weight"):
            tensors[name] = numbered.clone()
    write_model(tmp_path / "m", "internlm2", tensors=tensors)
    linears = open_checkpoint(tmp_path / "m").block(0).linears
    group = HEADS // KV + 2  # slots of a KV head: two query heads, key, value

    def head_rows(kv: int, slot: int) -> list[float]:
        return [float((kv * group + slot) * DIM + d) for d in range(DIM)]

    assert linears["q"].weight[:, 0].tolist() == head_rows(0, 0) + head_rows(0, 1) + head_rows(
        1, 0
    ) + head_rows(1, 1)
    assert linears["k"].weight[:, 0].tolist() == head_rows(0, 2) + head_rows(1, 2)
    assert linears["v"].weight[:, 0].tolist() == head_rows(0, 3) + head_rows(1, 3)


def test_c_attn_thirds(tmp_path) -> None:
    tensors = write_model(tmp_path / "m", "qwen")
    linears = open_checkpoint(tmp_path / "m").block(0).linears
    weight, bias = tensors["transformer.h.0.attn.c_attn.weight"], tensors["transformer.h.0.attn.c_attn.bias"]
    for place, role in enumerate("qkv"):
        assert torch.equal(linears[role].weight, weight[64 * place : 64 * place + 64])
        assert torch.equal(linears[role].bias, bias[64 * place : 64 * place + 64])


@pytest.mark.parametrize("family", ["internlm2", "qwen"])
@pytest.mark.parametrize("packed", [False, True])
def test_fused_tensors_split_and_join(family: str, packed: bool, tmp_path) -> None:
    write_model(tmp_path / "m", family)
    config = open_checkpoint(tmp_path / "m").config
    (layout,) = family_of(CONFIGS[family]).fused
    rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    weight = torch.randn(rows, 64)
    fused = LinearWeights(quantize(weight, 4, 32) if packed else weight, torch.randn(rows))
    stored = join_stored(split_stored(fused.stored(), layout, config), layout, config)
    joined = LinearWeights.from_stored(stored, 32)
    assert torch.equal(joined.bias, fused.bias)
    if packed:
        for part in ("codes", "scales", "zeros"):
            assert torch.equal(getattr(joined.weight, part), getattr(fused.weight, part))
    else:
        assert torch.equal(joined.weight, weight)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "mixtral"])
def test_folders_saved_by_transformers(family: str, tmp_path) -> None:
    """The real writer of such folders, and values found again in its modules."""
    config = transformers.AutoConfig.for_model(**{"rope_theta": 500.0} | CONFIGS[family])
    model = transformers.AutoModelForCausalLM.from_config(config).half()
    model.save_pretrained(tmp_path / "m")
    ckpt = open_checkpoint(tmp_path / "m")
    assert ckpt.config.rope_theta == 500.0 and ckpt.config.head_dim == CONFIGS[family].get("head_dim", DIM)
    block, layer = ckpt.block(1), model.model.layers[1]
    assert torch.equal(block.linears["k"].weight, layer.self_attn.k_proj.weight)
    assert torch.equal(block.norms["mlp_norm"], layer.post_attention_layernorm.weight)
    if family == "mixtral":
        gate_up = layer.mlp.experts.gate_up_proj[2]  # (2 I, H): gate first
        assert torch.equal(
            torch.cat([block.linears["experts.2.gate"].weight, block.linears["experts.2.up"].weight]), gate_up
        )
        assert torch.equal(block.linears["experts.2.down"].weight, layer.mlp.experts.down_proj[2])
    else:
        assert torch.equal(block.linears["down"].weight, layer.mlp.down_proj.weight)
    assert torch.equal(ckpt.lm_head(), model.lm_head.weight)


def test_shards_and_single_file_are_the_same(tmp_path) -> None:
    write_model(tmp_path / "one")
    write_model(tmp_path / "three", shards=3)
    one, three = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "three")
    for role, linear in one.block(1).linears.items():
        assert torch.equal(linear.weight, three.block(1).linears[role].weight)
    assert one.digest() != three.digest()  # the digest is of the files


def test_tied_head_is_the_embedding(tmp_path) -> None:
    tensors = write_model(tmp_path / "m", "qwen2")
    assert torch.equal(open_checkpoint(tmp_path / "m").lm_head(), tensors["model.embed_tokens.weight"])


def test_family_by_name(tmp_path) -> None:
    write_model(tmp_path / "m", "llama", architectures=["YiForCausalLM"], model_type="yi")
    assert open_checkpoint(tmp_path / "m", family="llama").config.family == "llama"


def test_older_checkpoints_hold_computed_tensors(tmp_path) -> None:
    tensors = random_tensors("llama")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    write_model(tmp_path / "m", tensors=tensors)
    assert open_checkpoint(tmp_path / "m").notes == []
