"""Worker processes that run functions as ranks of a gloo world, made once for a module of tests.

They come from a fork server that has imported torch and done nothing with it: a new process costs milliseconds, and no
thread of the test process is copied into it.
"""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT = 60.0
"""Seconds after which a collective that a rank does not join is an error."""

PATIENCE = 90.0
"""Seconds for an answer: on a busy machine one may be slow, and a rank that others wait for is told by their errors."""


class WorkerPool:
    """A world of ``world`` ranks that lives on from test to test: torch caches meshes, and with them process groups."""

    def __init__(self, world: int) -> None:
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["zoo.parallel.apply", "zoo.parallel.checkpoint", "zoo.parallel.grads", "zoo.weights"]
        )
        self._world = world
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """``function(*args, **kwargs)`` on each rank; results by rank.

        Raises:
            AssertionError: with the traceback of every rank that failed. The next run gets new processes.
        """
        if not self._workers:
            self._start()
        for _, connection in self._workers:
            connection.send((function, args, kwargs))
        return self._results()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers by rank."""
        return [process.pid for process, _ in self._workers]

    def close(self) -> None:
        """End the workers."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        store = tempfile.mkdtemp()
        for rank in range(self._world):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(theirs, f"{store}/store", rank, self._world), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        # The clock of the first test does not start before all have met.
        self._results()

    def _results(self) -> list[Any]:
        answers = self._collect()
        failed = [f"rank {rank}:\n{text}" for rank, (good, text) in enumerate(answers) if not good]
        if failed:
            self.close()
        assert not failed, "\n".join(failed)
        return [result for _, result in answers]

    def _collect(self) -> list[tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._workers)}
        failed = False
        while waiting:
            # A rank that failed leaves the others waiting for it: they get a moment to notice.
            ready = wait(list(waiting), timeout=3.0 if failed else PATIENCE)
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answers[rank] = connection.recv()
                except EOFError:
                    answers[rank] = (False, "the process died")
                failed = failed or not answers[rank][0]
            if not ready:
                if not failed:
                    self._print_stacks(waiting.values())
                answers |= {rank: (False, "gave no answer") for rank in waiting.values()}
                break
        return [answers[rank] for rank in range(self._world)]

    def _print_stacks(self, ranks: Iterable[int]) -> None:
        """What ranks without an answer do, to standard error."""
        for rank in ranks:
            os.kill(self.pids[rank], signal.SIGUSR1)
        time.sleep(1.0)


def _serve(connection: Connection, store: str, rank: int, world: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    faulthandler.register(signal.SIGUSR1)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    connection.send((True, None))
    while True:
        try:
            function, args, kwargs = connection.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            connection.send((True, function(*args, **kwargs)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


Pools = dict[int, WorkerPool]
"""World size → its pool."""
