"""Names of tensors in GGUF files, by the roles of `convert.families.table`. One table for reader and writer."""

ROLES = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "router": "ffn_gate_inp",
}
EXPERTS = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"}  # stacked: [E, N, K]
NORMS = {"attn_norm": "attn_norm", "mlp_norm": "ffn_norm", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}
EMBEDDING, FINAL_NORM, HEAD, ROPE = (
    "token_embd.weight",
    "output_norm.weight",
    "output.weight",
    "rope_freqs.weight",
)


def block_name(index: int, name: str, part: str = "weight") -> str:
    return f"blk.{index}.{name}.{part}"
