"""From a checkpoint to an engine core: device and dtype, weights, how much cache fits. The one place that decides these."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from convert.checkpoint import Checkpoint
from convert.config import ModelConfig
from convert.errors import InputError, ResourceError, UsageError
from convert.readers import open_checkpoint
from engine.api import SamplingParams
from engine.config import GIB, EngineConfig
from engine.gpu_checks import check_gpu
from engine.model.forward import Model, compute_dtype
from engine.model.kv_simulation import read_kv_params
from engine.model.parallel import TensorParallel
from engine.model.random_weights import random_checkpoint
from engine.serving.cache import CPU_CACHE_BYTES, PagedCache, block_bytes, plan_blocks
from engine.serving.core import EngineCore
from engine.serving.detokenize import TextTools
from engine.serving.runner import ModelRunner
from engine.serving.scheduler import Join, Segment, StepPlan
from engine.source import ModelSource
from kernels.kv.pages import StaticKV

# Bytes for each logit while tokens are drawn, at most: float32 logits as they came, shaped, their log-probabilities, scaled and cut
# (20), sorted values and places (12), float64 probabilities and their sums (16), and masks (4).
SAMPLING_BYTES = 52
GRAPH_BYTES = (
    256 * 1024**2
)  # activations and workspaces that CUDA graphs keep, beside the logits of each bucket

log = logging.getLogger(__name__)


def resolve_device(name: str) -> torch.device:
    """`--device` as a torch device. Raises UsageError for one that this machine does not have, ResourceError for one that
    cannot run the kernels."""
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            hint = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
            raise UsageError(
                f"--device {name}: this machine shows {count} CUDA devices{hint}; use --device cpu."
            )
        device = torch.device("cuda", device.index or 0)
        check_gpu(device)
    return device


def use_device(name: str) -> torch.device:
    """`resolve_device`, and this thread's CUDA device from here on: Triton launches there, wherever its tensors lie."""
    device = resolve_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def open_source(source: ModelSource, config: EngineConfig, rank: int = 0) -> Checkpoint:
    """The checkpoint that `source` names; random weights are made on the device of this rank."""
    if source.random_weights is None:
        return open_checkpoint(source.path, family=source.family)
    device = rank_device(config, rank)
    return random_checkpoint(
        source.random_weights, device, weights=source.weights, group_size=source.group_size
    )


def rank_device(config: EngineConfig, rank: int) -> torch.device:
    """The device of a rank: config.device, or the device `rank` places after it on a host with several GPUs."""
    device = resolve_device(config.device)
    if device.type != "cuda" or rank == 0:
        return device
    return resolve_device(f"cuda:{(device.index or 0) + rank}")


def make_core(
    ckpt: Checkpoint, config: EngineConfig, text: TextTools | None = None, *, name: str = ""
) -> EngineCore:
    """An engine on an open checkpoint; without `text`, its events carry tokens alone."""
    runner = make_runner(ckpt, config)
    return EngineCore(
        runner, config, text, name=name or ckpt.path.name, eos_token_ids=ckpt.config.eos_token_ids
    )


def make_runner(
    ckpt: Checkpoint,
    config: EngineConfig,
    parallel: TensorParallel | None = None,
    agree: Callable[[int], int] = lambda blocks: blocks,
) -> ModelRunner:
    """Weights and cache on the device. `agree` makes the ranks of a group use the same number of blocks.

    Raises ResourceError where weights or cache do not fit, with numbers.
    """
    device = rank_device(config, 0 if parallel is None else parallel.rank)
    if device.type == "cuda":
        if config.dtype == "float32":
            raise UsageError(
                "--dtype float32: serving on a GPU runs in float16 or bfloat16; use --device cpu for float32."
            )
        torch.cuda.set_device(device)
        if config.memory_cap_bytes is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, config.memory_cap_bytes / total), device)
    dtype = compute_dtype(ckpt.config, device, config.dtype)
    context_length = context_limit(ckpt.config, config.context_length)
    try:
        model = Model.from_checkpoint(ckpt, device, dtype, parallel=parallel)
        for note in model.notes:
            log.info("%s", note)
        free_bytes = _free_bytes(model, config, context_length)
        blocks = agree(plan_blocks(model.config, config, dtype, free_bytes, context_length))
        cache = _make_cache(model, config, blocks, _static(ckpt, config, parallel))
        runner = ModelRunner(model, cache, config, context_length)
        if config.warm_up:
            if device.type == "cuda":
                log.info("compiling and loading kernels: a minute or two the first time, seconds later")
            runner.warm_up()
        return runner
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"The model does not fit on {device}: {torch.cuda.memory_allocated(device) / GIB:.1f} GiB are taken, and the next "
            "allocation failed. Use an int4 checkpoint, --kv-bits 8, a smaller cache, or --tp."
        ) from error


def _make_cache(
    model: Model, config: EngineConfig, blocks: int, static: Sequence[StaticKV] | None = None
) -> PagedCache:
    try:
        return PagedCache(model.config, config, blocks, model.dtype, model.device, static)
    except ValueError as error:  # a head size that the kernels do not take
        raise InputError(
            f"No KV cache can be made for this model on {model.device}: {error} Use --device cpu."
        ) from error


def context_limit(model: ModelConfig, asked: int | None) -> int:
    """Tokens that a sequence may have: `asked`, or all that the positions of the model allow. Raises InputError for more."""
    scaling = model.rope_scaling
    limit = model.max_position
    if scaling is not None:
        limit = max(limit, int(scaling.original_max_position * scaling.factor))
    if asked is not None and asked > limit:
        raise InputError(
            f"A context of {asked} tokens was asked for, but the model's positions end at {limit}: ask for at most that."
        )
    return asked or limit


def _static(
    ckpt: Checkpoint, config: EngineConfig, parallel: TensorParallel | None
) -> Sequence[StaticKV] | None:
    """Static KV parameters of this rank's heads, where the configuration wants them."""
    if config.kv_bits != 8 or config.kv_mode != "static":
        return None
    params = read_kv_params(ckpt.path, ckpt.config)
    if parallel is None:
        return params
    heads = ckpt.config.num_kv_heads
    count = max(1, heads // parallel.size)
    first = parallel.rank * heads // parallel.size
    kept = slice(first, first + count)
    return [StaticKV(p.k_scale[kept], p.k_zero[kept], p.v_scale[kept], p.v_zero[kept]) for p in params]


def _free_bytes(model: Model, config: EngineConfig, context_length: int) -> int:
    """Bytes that the cache may share out: what is left beside the weights and the activations of the largest step."""
    device = model.device
    if device.type == "cpu":
        return _free_bytes_on_cpu(
            block_bytes(model.config, config, model.dtype) * -(-context_length // config.block_size),
            config,
            context_length,
        )
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _largest_step(model, config)
    activations = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    cap = min(config.memory_cap_bytes or total, total)
    free = min(free, cap - torch.cuda.memory_reserved(device))
    sampling = config.max_batch * model.vocab_size * SAMPLING_BYTES
    graphs = GRAPH_BYTES + sum(config.graph_batches) * model.vocab_size * 6 if config.cuda_graphs else 0
    gathered = gathered_bytes(model.config, context_length - config.max_step_tokens, model.dtype)
    return max(0, free - activations - sampling - graphs - gathered)


def _free_bytes_on_cpu(whole: int, config: EngineConfig, context_length: int) -> int:
    """Bytes for a cache in memory that is not the engine's alone; `whole`: those of one sequence of `context_length` tokens.

    A context that was asked for gets its room. That of the model may be a hundred times what anybody asks for here.
    """
    wanted = CPU_CACHE_BYTES
    if config.context_length is not None:
        wanted = max(wanted, math.ceil(whole / config.cache_fraction))
    free = min(wanted, _available_memory() // 2)
    held = int(free * config.cache_fraction)
    if config.cache_bytes is None and held < whole:
        log.warning(
            "the KV cache takes %.1f GiB and holds %d of the %d tokens of context: longer requests are refused. "
            "--session-len N makes room for N tokens.",
            held / GIB,
            held * context_length // whole,
            context_length,
        )
    return free


def gathered_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype) -> int:
    """What a chunk of a prompt takes besides, in one layer, for keys and values of `tokens` tokens before it: they are read from
    their pages as floats and, where heads share them within a window, given to each query head."""
    heads = config.num_kv_heads
    if config.sliding_window is not None and config.num_heads > heads:
        heads += config.num_heads
    return max(0, tokens) * 2 * heads * config.head_dim * dtype.itemsize


def _largest_step(model: Model, config: EngineConfig) -> None:
    """Run one chunk of `max_step_tokens` tokens on a cache of that size, made for this and dropped again."""
    tokens = config.max_step_tokens
    blocks = -(-tokens // config.block_size)
    config = replace(config, kv_mode="dynamic", cuda_graphs=False)
    cache = _make_cache(model, config, blocks)
    runner = ModelRunner(model, cache, config, tokens)
    segment = Segment(0, 0, tokens, (0,) * tokens, tuple(range(blocks)), samples=True)
    pending = runner.run(StepPlan((segment,), (Join(0, SamplingParams(temperature=0.0), 0, (0,), ()),), ()))
    assert pending is not None
    pending.wait()


def _available_memory() -> int:
    """Bytes that this process may still take: what the kernel calls available, or what its cgroup leaves, whichever is less."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            available = min(available, int(limit) - used)
    except (OSError, ValueError, KeyError):
        pass  # not Linux, or no cgroup v2: what was read so far stands
    return max(available, 0)
