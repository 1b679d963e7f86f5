"""How files hold a linear: what layouts, families and readers exchange."""

from torch import Tensor

# A linear as files hold it, output features last: `weight` (K, N) float, or `words` (K, N // 8) int32, eight codes each in
# sequential order, with `scales` (G, N) float16 and `zeros` (G, N) uint8; and `bias` (N,) where there is one.
Stored = dict[str, Tensor]
