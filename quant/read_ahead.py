"""Reads the blocks of a checkpoint ahead: on a GPU the next block is read and moved to the device while this one is computed."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint
from quant.block_states import FloatBlock
from quant.stage_clock import stage


def blocks_from(ckpt: Checkpoint, first: int, device: torch.device) -> Iterator[BlockWeights]:
    """The blocks from `first` on, one after the other. On a GPU they lie on the device, and a thread reads one block ahead.

    Raises what `Checkpoint.block` raises, when the block that is damaged is asked for.
    """
    layers = ckpt.config.num_layers
    if device.type != "cuda":
        for index in range(first, layers):
            with stage("read weights"):
                whole = ckpt.block(index)
            yield whole
        return
    stream = torch.cuda.Stream(device)
    with ThreadPoolExecutor(1, thread_name_prefix="read ahead") as pool:
        coming = pool.submit(_read, ckpt, first, stream) if first < layers else None
        for index in range(first, layers):
            assert coming is not None
            with stage("read weights"):
                block = coming.result()
            coming = pool.submit(_read, ckpt, index + 1, stream) if index + 1 < layers else None
            # made on the stream of the reader: not to be reused before this one is done
            for tensor in _tensors(block):
                tensor.record_stream(torch.cuda.current_stream(device))
            yield block
            del block


def _read(ckpt: Checkpoint, index: int, stream: torch.cuda.Stream) -> FloatBlock:
    block = FloatBlock.of(ckpt.block(index))
    with torch.cuda.stream(stream):
        moved = block.to(stream.device)
    stream.synchronize()
    return moved


def _tensors(block: FloatBlock) -> Iterator[Tensor]:
    """Every tensor of the block."""
    yield from block.norms.values()
    yield from block.vectors.values()
    for part in block.linears.values():
        yield part.weight
        if part.bias is not None:
            yield part.bias
