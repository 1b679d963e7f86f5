"""Throughput of the engine on one GPU (two with --parts tp), on models of random weights made there.

    python scripts/bench_throughput.py [--parts checks,ppl,static,memory,dynamic,70b,peer] [--seconds 420] [--out benchmarks]

Parts: checks (the engine's GPU tests), ppl (engine and kernels against a plain pass in torch), static (decode and prefill of the 7B shape
at fp16, int4, int4 + KV8), chain (ways of starting products behind their neighbours), memory (what fits under 24 GiB), dynamic (a committed
trace of dialogue lengths under the same cap), served (the same through the HTTP server), 70b (8 sequences of 32K), peer (transformers'
fp16 `generate` with static cache and compile), tp (70B on two GPUs). `--seconds` bounds the run: a part that would begin later is named as
left out, one that would end later is broken off, and what it has measured stays. throughput.json and throughput.md are written with every
row, after the runs that are there already where --append is given; with --profile, the kernels of a decode step too. The part served
needs fastapi, uvicorn and pydantic: scripts/fetch_serve_wheels.sh.
"""

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from throughput_parts import (  # noqa: E402
    run_70b,
    run_chain,
    run_checks,
    run_dynamic,
    run_memory,
    run_peer,
    run_static,
    run_tp,
)
from throughput_ppl import run_ppl  # noqa: E402
from throughput_report import START, Report, log, runs_of  # noqa: E402
from throughput_served import run_served  # noqa: E402

from engine.measure.device_limits import copy_bandwidth  # noqa: E402
from engine.measure.throughput import free_device  # noqa: E402
from turbomind_quant.cli.views.throughput import rows_table  # noqa: E402

# Seconds that a part may take, about twice what it should.
LIMITS_S = {"checks": 150, "ppl": 120, "static": 200, "chain": 240, "memory": 120, "dynamic": 240, "served": 240, "70b": 150,
            "peer": 240, "tp": 240}  # fmt: skip


class Overtime(BaseException):
    """A part has used up its time; no `except Exception` on the way may take it for a failure of its own."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises Overtime inside the block once the seconds have passed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Overtime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_parts(
    names: list[str], parts: dict[str, Callable[[float], None]], report: Report, seconds: float
) -> int:
    """Each part within its own limit and what is left of the run; the number of those that failed or were broken off."""
    failed = 0
    for name in names:
        left = seconds - (time.monotonic() - START)
        if left < 5:
            report.note(f"part {name}: left out, no time")
            continue
        limit = min(LIMITS_S[name], left)
        log(f"part {name}, at most {limit:.0f} s")
        try:
            with limited(limit):
                parts[name](limit)
        except Overtime:
            failed += 1
            report.note(f"part {name}: broken off after {limit:.0f} s; what it had measured stands above")
        except Exception as error:  # one part's failure must not lose what the others measured
            failed += 1
            traceback.print_exc()
            report.note(f"part {name} failed: {type(error).__name__}: {error}")
        free_device(torch.device("cuda", 0))
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="checks,ppl,static,memory,dynamic,70b,peer")
    parser.add_argument("--seconds", type=float, default=420.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    parser.add_argument("--append", action="store_true", help="keep the runs that are in OUT already")
    parser.add_argument("--requests", type=int, default=500, help="of the trace")
    parser.add_argument("--peer-batches", default="1,16")
    parser.add_argument("--profile", action="store_true", help="also write time by kernel of decode steps")
    args = parser.parse_args()
    names = [name.strip() for name in args.parts.split(",") if name.strip()]
    if unknown := [name for name in names if name not in LIMITS_S]:
        parser.error(f"unknown parts {', '.join(unknown)}: expected some of {', '.join(LIMITS_S)}")
    if not torch.cuda.is_available():
        print("No CUDA device: this benchmark needs one.", file=sys.stderr)
        return 4
    args.out.mkdir(parents=True, exist_ok=True)
    bandwidth = copy_bandwidth(torch.device("cuda", 0))
    torch.cuda.empty_cache()
    report = Report(bandwidth, args.out, earlier=runs_of(args.out) if args.append else [])
    log(f"{torch.cuda.get_device_name(0)}: copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    peers = tuple(int(part) for part in args.peer_batches.split(","))
    parts: dict[str, Callable[[float], None]] = {
        "checks": lambda limit: run_checks(report, limit),
        "ppl": lambda limit: run_ppl(report),
        "static": lambda limit: run_static(report, args.out if args.profile else None),
        "chain": lambda limit: run_chain(report),
        "memory": lambda limit: run_memory(report),
        "dynamic": lambda limit: run_dynamic(report, args.requests),
        "served": lambda limit: run_served(report, args.requests),
        "70b": lambda limit: run_70b(report),
        "peer": lambda limit: run_peer(report, peers),
        "tp": lambda limit: run_tp(report),
    }
    failed = run_parts(names, parts, report, args.seconds)
    Console(width=200).print(rows_table(report.rows))
    missed = [h["name"] for h in report.held if not h["holds"]]
    log(
        f"{len(report.held) - len(missed)} of {len(report.held)} bars hold"
        + (f"; missed: {', '.join(missed)}" if missed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
