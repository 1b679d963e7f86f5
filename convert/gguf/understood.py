"""Which metadata of a GGUF file are understood. A key that changes what the model computes and that nothing here reads is refused.

Keys are those of llama.cpp (`general.*`, `tokenizer.*`, `split.*` and `ARCHITECTURE.*`); only the last kind reaches the mathematics.
"""

from collections.abc import Mapping
from typing import Any

from convert.errors import InputError
from convert.folder.json_files import show, show_value
from convert.gguf.architectures import GgufArchitecture

READ = {  # by convert.gguf.config
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_attn_factor",
    "expert_count",
    "expert_used_count",
}
# facts that change nothing: what another key says as well, or how the model came about
WITHOUT_EFFECT = {"vocab_size", "rope.scaling.finetuned"}


def check_metadata(
    file: str, row: GgufArchitecture, fields: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Raises InputError naming the keys that change the model's function and are not understood, with their values."""
    head_dim, arch = config["head_dim"], fields["general.architecture"]
    neutral = {  # the only values with which these keys change nothing here
        "attention.value_length": (head_dim,),
        "attention.causal": (True,),
        "attention.scale": (0, head_dim**-0.5),
        "rope.scaling.yarn_ext_factor": (1, -1),
        "rope.scaling.attn_factor": (1, 0),
        "rope.scale_linear": (1, 0),
        "logit_scale": (1, 0),
        "residual_scale": (1, 0),
        "embedding_scale": (1, 0),
        "tensor_data_layout": ("Meta AI original pth",),  # what `permuted` stands for
    }
    window = fields.get(f"{arch}.attention.sliding_window")
    if isinstance(window, int) and window >= config["max_position_embeddings"]:
        neutral["attention.sliding_window"] = (window,)
    unknown = []
    for name, value in fields.items():
        key = name.removeprefix(f"{arch}.")
        if key == name or key in READ or key in row.keys or key in row.read or key in WITHOUT_EFFECT:
            continue
        allowed = neutral.get(key, (0, None, "", "none"))
        if not any(_equal(value, other) for other in allowed):
            unknown.append(f"{show(key, 60)} = {show_value(value, 40)}")
    if unknown:
        raise InputError(
            f"{show(file)}: its metadata have {len(unknown)} keys that change what a {row.model_type} model computes and that are not "
            f"understood here: {', '.join(unknown[:6])}{', ...' if len(unknown) > 6 else ''}. Use the model's safetensors."
        )


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, int | float):
        return abs(value - other) <= 1e-6 * max(1.0, abs(other))
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)
