"""The weights of all experts of a layer as one operand, in the order of `kernels.w4a16.layout` or as floats.

E experts, N rows of one expert's weight, K in features, KB = ceil(K / 128) blocks, P groups in a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.w4a16.layout import W4Weight


@dataclass(frozen=True)
class ExpertWeights:
    """One linear of every expert.

    int4: words (E, KB, N, 32) int16 and params (E, KB * P, N) int32. Float: words is the weight (E, N, K) in the compute
    dtype, params None, group_size 0. `is_paired`: rows 2i and 2i + 1 are row i of gate and of up, and the product is
    silu(gate) * up with N / 2 features.
    """

    words: Tensor
    params: Tensor | None
    in_features: int
    group_size: int
    is_paired: bool = False

    @property
    def experts(self) -> int:
        return self.words.shape[0]

    @property
    def rows(self) -> int:
        """N: rows of one expert's weight, both rows of each pair counted."""
        return self.words.shape[1] if self.params is None else self.words.shape[2]

    @property
    def out_features(self) -> int:
        return self.rows // 2 if self.is_paired else self.rows

    @property
    def size_bytes(self) -> int:
        return self.words.nbytes + (0 if self.params is None else self.params.nbytes)

    def of_expert(self, expert: int) -> "W4Weight | Tensor":
        """One expert's weight: a `W4Weight`, or floats (N, K)."""
        if self.params is None:
            return self.words[expert]
        return W4Weight(
            self.words[expert], self.params[expert], None, self.in_features, self.group_size, self.is_paired
        )


def stack(weights: Sequence[W4Weight]) -> ExpertWeights:
    """The same linear of every expert, stacked.

    Raises ValueError where shapes, group sizes or pairing differ, or where one has a bias, which the kernels do not add.
    """
    if not weights:
        raise ValueError("no experts were given to stack; at least one is needed.")
    first = weights[0]
    for number, weight in enumerate(weights):
        described = (weight.rows, weight.in_features, weight.group_size, weight.is_paired)
        expected = (first.rows, first.in_features, first.group_size, first.is_paired)
        if described != expected:
            raise ValueError(
                f"expert {number} has (N, K, group_size, is_paired) = {described}, expert 0 has {expected}."
            )
        if weight.bias is not None:
            raise ValueError(f"expert {number} has a bias; the kernels of experts add none.")
    words = torch.stack([weight.words for weight in weights])
    params = torch.stack([weight.params for weight in weights])
    return ExpertWeights(words, params, first.in_features, first.group_size, first.is_paired)


def stack_floats(weights: Sequence[Tensor], up: Sequence[Tensor] | None = None) -> ExpertWeights:
    """Float weights (N, K) of every expert, stacked; with `up`, rows of gate and up interleaved as pairs."""
    if up is not None:
        weights = [
            torch.stack((gate, other), dim=1).flatten(0, 1) for gate, other in zip(weights, up, strict=True)
        ]
    return ExpertWeights(torch.stack(list(weights)), None, weights[0].shape[1], 0, up is not None)
