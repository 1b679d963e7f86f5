"""The few questions that rules of engines ask. Each answers with what was found where it fits the rule, else with nothing.

N out features, K in features. `values` is the parameter that the row of the rule gives.
"""

from collections.abc import Callable
from typing import Any

from convert.verdict.artefact import COLUMN_PARALLEL, Artefact

Check = Callable[[Artefact, int, Any], str | None]


def other_architecture(artefact: Artefact, tp: int, values: Any) -> str | None:
    """The architecture is none of `values`."""
    return None if artefact.architecture in values else artefact.architecture


def other_architecture_with_experts(artefact: Artefact, tp: int, values: Any) -> str | None:
    """As `other_architecture`, for mixtures of experts alone."""
    return other_architecture(artefact, tp, values) if artefact.config.num_experts else None


def other_architecture_in_other_groups(artefact: Artefact, tp: int, values: Any) -> str | None:
    """`values`: (architectures, group size). Not one of them, and asymmetric or of other groups."""
    architectures, size = values
    if artefact.architecture in architectures or (artefact.group_size == size and artefact.symmetric):
        return None
    grid = "symmetric" if artefact.symmetric else "asymmetric"
    return f"{artefact.architecture}, {grid}, groups of {artefact.group_size}"


def this_architecture(artefact: Artefact, tp: int, values: Any) -> str | None:
    """The architecture is one of `values`."""
    return artefact.architecture if artefact.architecture in values else None


def other_format(artefact: Artefact, tp: int, values: Any) -> str | None:
    """The format is none of `values`."""
    return None if artefact.format in values else artefact.format


def any_model(artefact: Artefact, tp: int, values: Any) -> str | None:
    """Every artefact to which the row applies."""
    return artefact.format


def other_group(artefact: Artefact, tp: int, values: Any) -> str | None:
    """`values`: (sizes, architectures or None). Groups of another size, in one of the architectures."""
    sizes, architectures = values
    if architectures is not None and artefact.architecture not in architectures:
        return None
    return None if artefact.group_size in sizes else f"groups of {artefact.group_size}"


def asymmetric(artefact: Artefact, tp: int, values: Any) -> str | None:
    """Some zero point is not 8."""
    return None if artefact.symmetric else "zero points other than 8"


def experts(artefact: Artefact, tp: int, values: Any) -> str | None:
    """A mixture of experts."""
    return f"{artefact.config.num_experts} experts" if artefact.config.num_experts else None


def asymmetric_experts(artefact: Artefact, tp: int, values: Any) -> str | None:
    """A mixture of experts with zero points other than 8."""
    return experts(artefact, tp, values) if not artefact.symmetric else None


def expert_hidden(artefact: Artefact, tp: int, values: Any) -> str | None:
    """A mixture of experts whose hidden size is no multiple of `values`."""
    config = artefact.config
    return f"hidden size {config.hidden_size}" if config.num_experts and config.hidden_size % values else None


def float_linears(artefact: Artefact, tp: int, values: Any) -> str | None:
    """Linears that were left float."""
    if not artefact.float_linears:
        return None
    roles = sorted({name.split(".", 1)[1] for name in artefact.float_linears})
    return f"{len(artefact.float_linears)} linears left float ({', '.join(roles[:4])})"


def fused_of_two_kinds(artefact: Artefact, tp: int, values: Any) -> str | None:
    """q, k, v or gate, up of one block are partly int4, partly float: engines join them into one matrix."""
    for index in range(artefact.config.num_layers):
        for roles in (("q", "k", "v"), ("gate", "up")):
            kinds = {f"{index}.{role}" in artefact.float_linears for role in roles}
            if len(kinds) > 1:
                return f"block {index}: {', '.join(roles)} are partly int4 and partly float"
    return None


def heads(artefact: Artefact, tp: int, values: Any) -> str | None:
    """The attention heads cannot be shared among the ranks evenly."""
    count = artefact.config.num_heads
    return f"{count} attention heads on {tp} ranks" if count % tp else None


def fewer_kv_heads(artefact: Artefact, tp: int, values: Any) -> str | None:
    """More ranks than KV heads."""
    count = artefact.config.num_kv_heads
    return f"{count} KV heads on {tp} ranks" if count < tp else None


def inputs_per_rank(artefact: Artefact, tp: int, values: Any) -> str | None:
    """K of a linear, for each rank where it is cut, is no multiple of `values` (None: of the group). The MLP is left out for
    `values` (None, "attention"): some engines pad it."""
    multiple, part = values if isinstance(values, tuple) else (values, "all")
    multiple = multiple or artefact.group_size
    for role, (_, cols) in artefact.packed_shapes().items():
        last = role.rpartition(".")[2]
        if part == "attention" and last in ("gate", "up", "down"):
            continue
        ranks = 1 if last in COLUMN_PARALLEL else tp
        if cols % ranks or cols // ranks % multiple:
            return f"{role} has K = {cols}, {cols / ranks:g} for each of {ranks} ranks, no multiple of {multiple}"
    return None


def outputs_per_rank(artefact: Artefact, tp: int, values: Any) -> str | None:
    """N of a linear, for each rank where it is cut, is no multiple of `values`."""
    config = artefact.config
    for role, (rows, _) in artefact.packed_shapes().items():
        last = role.rpartition(".")[2]
        ranks = tp if last in COLUMN_PARALLEL else 1
        if last in ("k", "v"):
            ranks = min(tp, config.num_kv_heads)  # heads are copied where there are fewer than ranks
        if rows % ranks or rows // ranks % values:
            return (
                f"{role} has N = {rows}, {rows / ranks:g} for each of {ranks} ranks, no multiple of {values}"
            )
    return None


def joined_outputs_per_rank(artefact: Artefact, tp: int, values: Any) -> str | None:
    """As `outputs_per_rank`, after q, k, v and gate, up are joined."""
    config, shapes = artefact.config, artefact.packed_shapes()
    for parts in (("q", "k", "v"), ("gate", "up")):
        if all(part in shapes for part in parts):
            copies = max(1, tp // config.num_kv_heads)
            rows = sum(shapes[p][0] * (copies if p in ("k", "v") else 1) for p in parts) / tp
            if rows % values:
                return f"{'+'.join(parts)} have N = {rows:g} for each of {tp} ranks, no multiple of {values}"
    others = {role: shape for role, shape in shapes.items() if role in ("o", "down")}
    for role, (rows, _) in others.items():
        if rows % values:
            return f"{role} has N = {rows}, no multiple of {values}"
    return None


def head_dim(artefact: Artefact, tp: int, values: Any) -> str | None:
    """`values`: (sizes, architectures). hidden size / heads is none of the sizes."""
    sizes, architectures = values
    config = artefact.config
    found = config.hidden_size // config.num_heads
    if artefact.architecture not in architectures or found in sizes:
        return None
    return f"hidden size / heads = {found}"


def sliding_window(artefact: Artefact, tp: int, values: Any) -> str | None:
    """Some layers see a window of tokens alone."""
    window = artefact.config.sliding_window
    return None if window is None else f"a sliding window of {window} tokens"


def bits_below_four(artefact: Artefact, tp: int, values: Any) -> str | None:
    """int3 or int2 codes in nibbles."""
    return f"int{artefact.bits} codes in 4-bit nibbles" if artefact.bits < 4 else None


def kv_parameters(artefact: Artefact, tp: int, values: Any) -> str | None:
    """Parameters of a static int8 KV cache lie in the folder."""
    return "parameters of a static int8 KV cache" if artefact.has_kv_parameters else None


def ranks(artefact: Artefact, tp: int, values: Any) -> str | None:
    """More than one rank was asked for."""
    return f"{tp} ranks" if tp > 1 else None


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        other_architecture,
        other_architecture_with_experts,
        other_architecture_in_other_groups,
        this_architecture,
        other_format,
        any_model,
        other_group,
        asymmetric,
        experts,
        asymmetric_experts,
        expert_hidden,
        float_linears,
        fused_of_two_kinds,
        heads,
        fewer_kv_heads,
        inputs_per_rank,
        outputs_per_rank,
        joined_outputs_per_rank,
        head_dim,
        sliding_window,
        bits_below_four,
        kv_parameters,
        ranks,
    )
}
