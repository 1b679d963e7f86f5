"""Tensor parallelism over processes of one host: rank 0 schedules, the others run the same plans on their part of the model.

Plans go to the ranks as JSON lines on their standard input; tensors go through torch.distributed (nccl between GPUs, gloo between CPUs), which
meets through a file. Every rank draws tokens itself: the logits are gathered, so all ranks see the same numbers and draw the
same tokens. A rank that fails ends the group, since the others cannot know how far it came.
"""

import json
import logging
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from convert.errors import ResourceError, UsageError
from engine.api import EngineDied, SamplingParams
from engine.config import EngineConfig
from engine.loading import make_runner, open_source, rank_device
from engine.model.parallel import distributed
from engine.process.environment import child_environment, claim_output, ignore_signals, log_format
from engine.serving.runner import ModelRunner
from engine.serving.sampled import PendingSample
from engine.serving.scheduler import Join, Segment, StepPlan
from engine.source import ModelSource

GROUP_TIMEOUT = timedelta(minutes=10)  # for the slowest rank to load its weights
STOP_GRACE_S = 5.0  # for a rank to come to its end once rank 0 has ended
LOSS_GRACE_S = 2.0  # while loading: for rank 0 to say itself what is wrong, where another rank has ended


def encode_plan(plan: StepPlan) -> str:
    """A plan as one line of JSON, without the sequences, which only the scheduler needs."""
    return json.dumps(
        {"segments": [asdict(s) for s in plan.segments], "joins": [asdict(j) for j in plan.joins]}
    )


def decode_plan(line: str) -> StepPlan:
    """The inverse of `encode_plan`; `sequences` is empty."""
    raw = json.loads(line)
    segments = tuple(
        Segment(
            **{
                **s,
                "token_ids": tuple(s["token_ids"]),
                "blocks": tuple(s["blocks"]),
                "targets": tuple(s["targets"]),
            }
        )
        for s in raw["segments"]
    )
    return StepPlan(segments, tuple(_join(j) for j in raw["joins"]), ())


def _join(raw: dict[str, Any]) -> Join:
    sampling = raw["sampling"]
    sampling["stop"], sampling["stop_token_ids"] = tuple(sampling["stop"]), tuple(sampling["stop_token_ids"])
    sampling["logit_bias"] = tuple((int(token), float(bias)) for token, bias in sampling["logit_bias"])
    return Join(
        raw["row"],
        SamplingParams(**sampling),
        raw["seed"],
        tuple(raw["prompt_ids"]),
        tuple(raw["output_ids"]),
    )


class _Watch:
    """Ends this process when another rank ends that is still wanted: it may wait for the lost one inside a collective operation."""

    def __init__(self, others: Sequence["subprocess.Popen[str]"]) -> None:
        self.is_loading, self.is_closing = True, False
        for process in others:
            threading.Thread(target=self._wait, args=(process,), daemon=True).start()

    def _wait(self, process: "subprocess.Popen[str]") -> None:
        code = process.wait()
        if self.is_loading:
            time.sleep(LOSS_GRACE_S)
        if not self.is_closing:
            logging.getLogger(__name__).error("a tensor-parallel rank ended with code %d", code)
            os._exit(1)


class GroupRunner:
    """A `Runner` over a group: each plan goes to the other ranks, then runs here."""

    def __init__(
        self, runner: ModelRunner, others: Sequence["subprocess.Popen[str]"], folder: str, watch: _Watch
    ) -> None:
        """`folder` holds the file through which the ranks met; it goes with the group."""
        self.local, self._others, self._folder, self._watch = runner, others, folder, watch
        self.num_blocks, self.block_size = runner.num_blocks, runner.block_size
        self.context_length, self.vocab_size = runner.context_length, runner.vocab_size
        self.lookahead = runner.lookahead
        watch.is_loading = False

    def run(self, plan: StepPlan) -> PendingSample | None:
        line = encode_plan(plan) + "\n"
        try:
            for process in self._others:
                assert process.stdin is not None
                process.stdin.write(line)
                process.stdin.flush()
            return self.local.run(plan)
        except (RuntimeError, ValueError, OSError) as error:
            raise EngineDied("A rank of the tensor-parallel group failed: the group cannot go on.") from error

    def close(self) -> None:
        """End the other ranks and leave the group."""
        self._watch.is_closing = True
        for process in self._others:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._others:
            process.wait()
        self.local.close()  # first: NCCL ends a communicator when the graphs that hold its operations are gone
        dist.destroy_process_group()
        shutil.rmtree(self._folder, ignore_errors=True)


def start_group(source: ModelSource, config: EngineConfig) -> GroupRunner:
    """Start the ranks 1 .. tp - 1 as processes, and this one as rank 0. Raises UsageError where there are too few GPUs."""
    device = rank_device(config, 0)
    if device.type == "cuda":
        count = torch.cuda.device_count() - (device.index or 0)
        if count < config.tp:
            raise UsageError(f"--tp {config.tp}: only {count} CUDA devices are visible from {device} on.")
    folder = tempfile.mkdtemp(prefix="tmq-ranks-")
    store = str(Path(folder) / "store")
    others = []
    for rank in range(1, config.tp):
        process = subprocess.Popen(
            [sys.executable, "-m", "engine.process.ranks"],
            stdin=subprocess.PIPE,
            text=True,
            env=child_environment(),
        )
        assert process.stdin is not None
        first = {"source": asdict(source), "config": asdict(config), "rank": rank, "store": store}
        process.stdin.write(json.dumps(first) + "\n")
        process.stdin.flush()
        others.append(process)
    watch = _Watch(others)
    try:
        return GroupRunner(_join_group(source, config, 0, store), others, folder, watch)
    except BaseException:
        watch.is_closing = True
        for process in others:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _join_group(source: ModelSource, config: EngineConfig, rank: int, store: str) -> ModelRunner:
    device = rank_device(config, rank)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one host: nothing is to listen beyond it
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend, init_method=f"file://{store}", rank=rank, world_size=config.tp, timeout=GROUP_TIMEOUT
        )
    except RuntimeError as error:
        raise ResourceError(f"The {config.tp} ranks could not form a {backend} group: {error}") from error

    def agree(blocks: int) -> int:
        least = torch.tensor([blocks], device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return int(least.item())

    return make_runner(open_source(source, config, rank), config, distributed(), agree)


def main() -> int:
    claim_output().close()
    ignore_signals()
    first = json.loads(sys.stdin.readline())
    first["config"]["graph_batches"] = tuple(first["config"]["graph_batches"])
    level = first["config"]["log_level"].upper()
    logging.basicConfig(level=level, format=log_format("rank"), stream=sys.stderr)
    config = EngineConfig(**first["config"])
    plans: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin, plans), daemon=True).start()
    runner = _join_group(ModelSource(**first["source"]), config, first["rank"], first["store"])
    while (line := plans.get()) is not None:
        runner.run(decode_plan(line))
    runner.close()
    dist.destroy_process_group()
    return 0


def _listen(lines: Iterable[str], plans: "queue.SimpleQueue[str | None]") -> None:
    for line in lines:
        plans.put(line)
    plans.put(None)
    time.sleep(STOP_GRACE_S)
    os._exit(1)  # rank 0 is gone, and what this rank waits for does not come


if __name__ == "__main__":
    sys.exit(main())
