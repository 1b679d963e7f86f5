"""Which formats a checkpoint can be packed into, and as what. Refuses before anything is written."""

from convert.checkpoint import Checkpoint
from convert.config import Method, QuantFormat
from convert.errors import InputError
from convert.families.table import linear_shapes
from convert.folder.json_files import show
from convert.formats import FolderFormat
from convert.linear_layouts.base import is_symmetric

LOADED_GROUPS = {
    "compressed-tensors": (32, 64, 128),
    "mlx": (32, 64, 128),
}  # that the readers of a format know


def check_source(source: Checkpoint, target: str) -> QuantFormat:
    """The format of a source that can be packed as int4. Raises InputError where it cannot."""
    fmt = source.config.quantization
    where = show(str(source.path))
    if fmt is None:
        raise InputError(
            f"{where} is a float checkpoint: {target} holds int4 codes, and packing chooses none. Quantize it first "
            "(quantize awq MODEL -o OUT), then pack OUT."
        )
    if fmt.bits != 4:
        raise InputError(
            f"{where} has {fmt.bits}-bit codes, which are held in nibbles and save nothing over int4: {target} is written from "
            "4-bit ones. Quantize with --bits 4."
        )
    groups = LOADED_GROUPS.get(target)
    if groups is not None and fmt.group_size not in groups:
        raise InputError(
            f"{where} has groups of {fmt.group_size}: readers of {target} know {', '.join(map(str, groups))}. Quantize again "
            "with one of these as --group-size."
        )
    return fmt


def is_symmetric_model(source: Checkpoint) -> bool:
    """Whether every zero point of the model is 8. Reads block by block, up to the first that is not."""
    fmt = source.config.quantization
    if fmt is None:
        return False
    if fmt.symmetric:
        return True
    for index in range(source.config.num_layers):
        linears = source.stored_linears(index, linear_shapes(source.config.of_layer(index)))
        if not all(is_symmetric(linear["zeros"]) for linear in linears.values() if "zeros" in linear):
            return False
    return True


def target_format(source: Checkpoint, target: FolderFormat) -> QuantFormat | None:
    """The layout in which `source` is written; None for plain float16. Raises InputError where it cannot be."""
    if target == "float16":
        return None
    fmt = check_source(source, target)
    method: Method = target
    symmetric = method != "mlx" and is_symmetric_model(source)
    zero_offset = 1 if method == "gptq" and symmetric else 0
    return QuantFormat(4, fmt.group_size, (), method, symmetric, zero_offset)
