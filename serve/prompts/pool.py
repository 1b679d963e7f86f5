"""`WorkerPool`: an encoder of several worker processes, which are killed where they take too long, and made anew.

Each worker has one job at a time. One client has all but one of them at most, so that a client with long prompts leaves the others a
way through. What a client leaves goes on to its end or its time: starting a worker costs more than most jobs.
"""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import InputError, TmqError
from engine.process.environment import child_environment
from serve.prompts.encoder import PROMPT_S, Messages, TemplateTraits, Tools

WORKERS = 2
START_S = 120.0  # to start a worker and load its tokenizer
ANSWER_BYTES = 1 << 26
JOBS_PER_CLIENT = 256  # running or waiting


class Busy(Exception):
    """A client has as many prompts waiting as it may."""


class WorkerFailed(Exception):
    """A worker ended inside a job, or a job failed in a way that nobody foresaw."""


class _Worker:
    def __init__(self, process: asyncio.subprocess.Process, ready: dict[str, Any]) -> None:
        self.process, self.ready = process, ready

    async def call(self, job: bytes) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(job)
        await self.process.stdin.drain()
        line = await self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise WorkerFailed("a worker ended inside a job")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def end(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@dataclass
class _Turns:
    """The places of one client, and how many jobs stand for them."""

    places: asyncio.Semaphore
    jobs: int = 0


class WorkerPool:
    """Encodes in processes. Belongs to the event loop that first uses it."""

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        trust_remote_code: bool = False,
        *,
        workers: int = WORKERS,
        timeout_s: float = PROMPT_S,
    ) -> None:
        self._first = {
            "folder": str(folder),
            "trust_remote_code": trust_remote_code,
            "timeout_s": timeout_s + 5.0,
        }
        self.vocab_size, self._count, self._timeout_s = vocab_size, workers, timeout_s
        self._idle: asyncio.LifoQueue[_Worker | None] | None = None
        self._turns: dict[str, _Turns] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._alive: set[_Worker] = set()
        self._traits: TemplateTraits | None = None
        self.kills: Counter[str] = Counter()  # workers that were ended, by the reason

    async def traits(self) -> TemplateTraits:
        if self._traits is None:
            worker = await self._take()
            self._put(worker)
        assert self._traits is not None
        return self._traits

    async def text(self, text: str, add_bos: bool | None, client: str = "") -> list[int]:
        ids: list[int] = (await self._do({"text": text, "add_bos": add_bos}, client))["ids"]
        return ids

    async def pieces(self, ids: Sequence[int], client: str = "") -> list[bytes]:
        return [
            piece.encode("latin-1") for piece in (await self._do({"pieces": list(ids)}, client))["pieces"]
        ]

    async def chat(
        self, messages: Messages, tools: Tools, variables: Mapping[str, Any], client: str = ""
    ) -> list[int]:
        job = {"messages": list(messages), "tools": list(tools or []), "variables": dict(variables)}
        ids: list[int] = (await self._do(job, client))["ids"]
        return ids

    async def check_schema(self, schema: str, client: str = "") -> None:
        await self._do({"schema": schema}, client)

    async def close(self) -> None:
        """End all workers, busy or not."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.end() for worker in list(self._alive)))
        self._alive.clear()

    async def _do(self, job: dict[str, Any], client: str) -> dict[str, Any]:
        turns = self._turns.setdefault(client, _Turns(asyncio.Semaphore(max(1, self._count - 1))))
        if turns.jobs >= JOBS_PER_CLIENT:
            raise Busy
        turns.jobs += 1
        task = asyncio.create_task(self._run(json.dumps(job).encode() + b"\n", turns, client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        answer = await asyncio.shield(task)
        if "error" in answer:
            raise WorkerFailed("a job failed") if answer["error"] is None else InputError(answer["error"])
        return answer

    async def _run(self, job: bytes, turns: _Turns, client: str) -> dict[str, Any]:
        try:
            async with turns.places:
                worker = await self._take()
                done = False
                try:
                    answer = await asyncio.wait_for(worker.call(job), self._timeout_s)
                    done = True
                    return answer
                except asyncio.TimeoutError:
                    self.kills["time"] += 1
                    raise
                except (OSError, ValueError, WorkerFailed) as error:
                    self.kills["failure"] += 1
                    raise WorkerFailed("a worker ended inside a job") from error
                finally:
                    if not done:
                        await self._drop(worker)
                    self._put(worker if done else None)
        finally:
            turns.jobs -= 1
            if not turns.jobs:
                self._turns.pop(client, None)

    def _put(self, worker: _Worker | None) -> None:
        assert self._idle is not None
        self._idle.put_nowait(worker)

    async def _drop(self, worker: _Worker) -> None:
        self._alive.discard(worker)
        await worker.end()

    async def _take(self) -> _Worker:
        """An idle worker, started where there is none yet. Give it back with `_put`."""
        if self._idle is None:
            self._idle = asyncio.LifoQueue()
            for _ in range(self._count):
                self._put(None)
        worker = await self._idle.get()
        if worker is not None and worker.process.returncode is None:
            return worker
        if worker is not None:
            self._alive.discard(worker)
        try:
            return await asyncio.wait_for(self._start(), START_S)
        except BaseException:
            self._put(None)
            raise

    async def _start(self) -> _Worker:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "serve.prompts.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=child_environment(),
            limit=ANSWER_BYTES,
        )
        worker = _Worker(process, {})
        self._alive.add(worker)
        try:
            worker.ready = await worker.call(json.dumps(self._first).encode() + b"\n")
        except BaseException as error:
            await self._drop(worker)
            if isinstance(error, WorkerFailed | OSError):
                raise TmqError(
                    "The process that reads prompts does not start: the server's log says why."
                ) from error
            raise
        traits = worker.ready["traits"]
        self._traits = TemplateTraits(**{**traits, "variables": tuple(traits["variables"])})
        return worker
