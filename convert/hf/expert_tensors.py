"""Experts in one 3-D tensor, as transformers 5 holds them, seen as a tensor an expert. Nothing is read or copied.

E experts, N rows, K columns. gate_up_proj (E, 2 I, H) has the gate's rows first; down_proj is (E, H, I). Each expert's rows lie
in one run of bytes, so every linear of an expert is an entry of its own in the table of tensors.
"""

from dataclasses import replace

from convert.config import ModelConfig
from convert.errors import InputError
from convert.families.family import Family
from convert.folder.json_files import show
from convert.hf.safetensors_files import TensorInfo


def split_experts(
    tensors: dict[str, TensorInfo], family: Family, config: ModelConfig
) -> dict[str, list[str]]:
    """Replace fused tensors of the table by their experts', and other names of modules by ours.

    Returns the names that were replaced, each with those that stand for it. Raises InputError for shapes that no mixture has.
    """
    replaced: dict[str, list[str]] = {}
    for index in range(config.num_layers if config.num_experts else 0):
        prefix = family.block.format(i=index)
        for other, ours in family.renamed.items():
            _rename(tensors, prefix + other, prefix + ours)
        for module, roles in family.fused_experts.items():
            names = [prefix + module, prefix + module + ".weight"]
            names += [prefix + ours + module.removeprefix(other)
                      for other, ours in family.renamed.items() if module.startswith(other)]  # fmt: skip
            name = next((name for name in names if name in tensors), None)
            if name is not None:
                parts = _split(tensors.pop(name), prefix, roles, family, config)
                tensors |= parts
                replaced[name] = list(parts)
    return replaced


def _rename(tensors: dict[str, TensorInfo], other: str, ours: str) -> None:
    for name in [name for name in tensors if name.startswith(other + ".")]:
        renamed = ours + name.removeprefix(other)
        if renamed not in tensors:
            tensors[renamed] = tensors.pop(name)


def _split(
    info: TensorInfo, prefix: str, roles: tuple[str, ...], family: Family, config: ModelConfig
) -> dict[str, TensorInfo]:
    size, hidden = config.expert_size, config.hidden_size
    rows, cols = (hidden, size) if roles == ("down",) else (size, hidden)
    expected = (config.num_experts, len(roles) * rows, cols)
    if info.shape != expected:
        raise InputError(
            f"tensor {show(info.name)!r} has shape {list(info.shape)}, but config.json asks for {list(expected)}: all experts, "
            f"{' and '.join(roles)} one after the other. They belong to different models; copy both again."
        )
    width = rows * cols * info.dtype.itemsize
    found = {}
    for expert in range(config.num_experts):
        for place, role in enumerate(roles):
            module = family.linears["experts.{e}." + role].format(e=expert)
            start = info.start + (expert * len(roles) + place) * width
            name = f"{prefix}{module}.weight"
            found[name] = replace(info, name=name, shape=(rows, cols), start=start, end=start + width)
    return found
