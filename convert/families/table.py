"""Model families looked up by name or config.json, and what a model's configuration makes of a family's row: modules and shapes.

Knows no files. `rows.py` has the rows, `family.py` says what a row and a role are.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from convert.config import ModelConfig
from convert.errors import InputError
from convert.families.family import Family
from convert.families.other_maths import LOOKALIKES
from convert.families.rows import FAMILIES

BY_NAME = {family.name: family for family in FAMILIES}


def family_named(name: str) -> Family:
    """The family with this name. Raises InputError naming the nearest known one."""
    if name in BY_NAME:
        return BY_NAME[name]
    near = difflib.get_close_matches(name.lower(), BY_NAME, n=1, cutoff=0.3)
    hint = f" The nearest known name is {near[0]!r}." if near else ""
    raise InputError(f"Unknown model family {name[:80]!r}.{hint} Known families: {', '.join(BY_NAME)}.")


def family_of(raw: Mapping[str, Any], override: str | None = None) -> Family:
    """The family of a parsed config.json, by architecture, else by model_type; `override` (--family) decides instead.

    Raises InputError for an unknown one, naming the nearest known architecture and the switch.
    """
    if override is not None:
        return family_named(override)
    architectures = raw.get("architectures")
    names = [a for a in architectures if isinstance(a, str)] if isinstance(architectures, list) else []
    for family in FAMILIES:
        if family.architecture in names:
            return family
    model_type = raw.get("model_type")
    if not names:
        for family in FAMILIES:
            if model_type in family.model_types:
                return family
    found = names[0] if names else str(model_type or "none")
    if found in LOOKALIKES:
        raise InputError(
            f"config.json: architecture {found!r} is not a known family: it has {LOOKALIKES[found]}, so no --family computes it. Known "
            f"families: {', '.join(BY_NAME)}."
        )
    known = {_stem(family.architecture): family for family in FAMILIES}
    known.update({family.name: family for family in FAMILIES})
    near = difflib.get_close_matches(_stem(found), known, n=1, cutoff=0.75)
    hint = f" The nearest known one is {known[near[0]].architecture}" if near else " Nothing known is near it"
    flag = f" (--family {known[near[0]].name})" if near else ""
    code = (
        " Its auto_map names code inside the checkpoint, which is never run."
        if isinstance(raw.get("auto_map"), dict)
        else ""
    )
    raise InputError(
        f"config.json: architecture {found[:80]!r} is not a known family.{hint}{flag}.{code} Known families: "
        f"{', '.join(BY_NAME)}. If the model computes exactly what one of them does, name it with --family."
    )


def _stem(architecture: str) -> str:
    """What tells architectures apart: without the ending that nearly all share, also where it is misspelt."""
    return re.sub(r"(_?for)?[ca]+us?[al]+(lm|ml)$|lmheadmodel$", "", architecture.lower())


def names_of(config: ModelConfig) -> Family:
    """The row of a model's family, with the names of the tree in which its checkpoint holds the language model."""
    family, tree = BY_NAME[config.family], config.tree
    if tree is None:
        return family
    return replace(
        family,
        block=tree.block,
        embedding=tree.embedding,
        final_norm=tree.final_norm,
        lm_head=tree.lm_head,
    )


def stays_float(role: str) -> bool:
    """Whether a linear is never quantized: routers and the gate of a shared expert."""
    return role.rsplit(".", 1)[-1] == "router"


def linear_modules(family: Family, config: ModelConfig) -> dict[str, str]:
    """Role -> module name inside the block, in a fixed order, for one layer's configuration. Linears of fused tensors are not listed."""
    modules: dict[str, str] = {}
    for role in linear_shapes(config):
        parts = role.split(".")
        pattern = ".".join(("experts", "{e}", parts[2])) if parts[0] == "experts" else role
        if pattern in family.linears:
            modules[role] = family.linears[pattern].format(e=parts[1] if len(parts) > 2 else "")
    return modules


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Role -> (N, K) of every linear of a layer with this configuration (`ModelConfig.of_layer`), q first."""
    hidden = config.hidden_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    if not config.num_experts:
        return shapes | _mlp_shapes("", config.intermediate_size, hidden)
    shapes["router"] = (config.num_experts, hidden)
    for expert in range(config.num_experts):
        shapes |= _mlp_shapes(f"experts.{expert}.", config.expert_size, hidden)
    if config.shared_intermediate_size:
        shapes |= _mlp_shapes("shared.", config.shared_intermediate_size, hidden)
        if config.shared_gated:
            shapes["shared.router"] = (1, hidden)
    return shapes


def _mlp_shapes(prefix: str, inner: int, hidden: int) -> dict[str, tuple[int, int]]:
    return {
        prefix + "gate": (inner, hidden),
        prefix + "up": (inner, hidden),
        prefix + "down": (hidden, inner),
    }


def norm_shapes(config: ModelConfig) -> dict[str, tuple[int]]:
    """Role -> shape of every norm weight of a block."""
    roles = {
        "before": ("attn_norm", "mlp_norm"),
        "around": ("attn_norm", "attn_out_norm", "mlp_norm", "mlp_out_norm"),
        "after": ("attn_out_norm", "mlp_out_norm"),
    }[config.norm_placement]
    shapes: dict[str, tuple[int]] = {role: (config.hidden_size,) for role in roles}
    if config.qk_norm:
        whole = config.qk_norm_width == "all"
        shapes["q_norm"] = (config.head_dim * (config.num_heads if whole else 1),)
        shapes["k_norm"] = (config.head_dim * (config.num_kv_heads if whole else 1),)
    return shapes


def vector_shapes(config: ModelConfig) -> dict[str, tuple[int]]:
    """Role -> shape of what a layer holds beside linears and norms."""
    return {"router_bias": (config.num_experts,)} if config.num_experts and config.router.corrected else {}


def bias_roles(config: ModelConfig) -> set[str]:
    """Roles of the linears that have a bias."""
    roles: set[str] = set()
    if config.qkv_bias:
        roles |= {"q", "k", "v"}
    if config.o_bias:
        roles.add("o")
    if config.mlp_bias:
        roles |= {"gate", "up", "down"}
    return roles


def expert_roles(config: ModelConfig, *parts: str) -> tuple[str, ...]:
    """Roles of these parts ("gate", "up", "down") of every expert, the shared one last."""
    names = [f"experts.{e}." for e in range(config.num_experts)]
    names += ["shared."] if config.shared_intermediate_size else []
    return tuple(name + part for name in names for part in parts)


def scale_groups(config: ModelConfig) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Pairs (previous operation, linears that read it) into which per-channel scales fold, as AWQ publishes them.

    v -> o has one scale per KV channel, shared by its query heads. Routers read the same norm as the experts. Where a half
    reads the residual stream itself (norms after it alone), nothing before takes a scale over.
    """
    groups: list[tuple[str, tuple[str, ...]]] = [("v", ("o",))]
    if not config.num_experts:
        groups += [("mlp_norm", ("gate", "up")), ("up", ("down",))]
    else:
        readers = ("router", *expert_roles(config, "gate", "up"))
        readers += ("shared.router",) if config.shared_gated and config.shared_intermediate_size else ()
        groups.append(("mlp_norm", readers))
        groups += [(role.removesuffix("down") + "up", (role,)) for role in expert_roles(config, "down")]
    groups.insert(0, ("attn_norm", ("q", "k", "v")))
    if config.norm_placement == "after":
        groups = [(before, readers) for before, readers in groups if not before.endswith("_norm")]
    return tuple(groups)
