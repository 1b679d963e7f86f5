"""The linears of a block searched on saved statistics of the float stream, in place of text."""

from collections.abc import Mapping

from quant.block_states import QuantizedBlock
from quant.block_task import BlockResult
from quant.search.block_search import BlockSearch
from quant.search.experts import experts_from_statistics
from quant.search.scales.folding import Fold, fold_norm, kv_fold, no_fold, norm_fold, row_fold
from quant.statistics.gram import InputStatistics


def search_on_statistics(search: BlockSearch, saved: Mapping[str, InputStatistics]) -> BlockResult:
    """Quantize the block; no stream comes out."""

    def stats(name: str) -> InputStatistics:
        return saved[name].to(search.device)

    for roles, name, norm_role in (
        (("q", "k", "v"), "attn_in", "attn_norm"),
        (("gate", "up"), "mlp_in", "mlp_norm"),
    ):
        if roles[0] not in search.source.linears or not search.fits(roles[0]):
            continue
        norm, offset = search.source.norms.get(norm_role), search.config.norm_offset
        if norm is None:
            search.quantize(roles, stats(name), no_fold())
            continue
        solution = search.quantize(roles, stats(name), norm_fold(norm, offset))
        search.put_norm(norm_role, fold_norm(norm, solution.channel_scale, offset))
    lasts: list[tuple[str, str, str, Fold]] = [("o", "v", "o_in", kv_fold(search.weight("v"), search.config))]
    if "down" in search.source.linears:
        lasts.append(("down", "up", "down_in", row_fold(search.weight("up"))))
    for role, before, name, fold in lasts:
        if search.fits(role):
            solution = search.quantize((role,), stats(name), fold)
            search.fold_back(before, solution)
    if search.config.num_experts:
        experts_from_statistics(search, saved)
    return BlockResult(QuantizedBlock.of(search.weights), tuple(search.reports), None)
