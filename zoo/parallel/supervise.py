"""A lost rank ends the others soon, with a message that names it, whatever they are waiting for."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from zoo.parallel.torch_private import collectives_begun

REQUEUE = 75
"""Exit code of a run that was told to stop and saved a checkpoint: EX_TEMPFAIL of sysexits.h, "try again"."""
BEAT_SECONDS = 1.0
PATIENCE_SECONDS = 15.0
"""A rank that gives no sign of life for this long is lost."""
MEETING_SECONDS = 60.0
"""What the processes of a run may differ in the time that they need to start, however short its timeout."""
GRACE_SECONDS = 5.0
"""What a rank gets to end by itself, with an error of its own, before it is ended."""


class Watch(threading.Thread):
    """Tells the other ranks that this one lives and how far it is, and looks after the next one.

    The signs of life go through the store in which the processes met, on a connection of their own: a rank that waits
    in a collective still gives them, and one that is gone or stopped does not. A rank that lives but hangs is known by
    having begun the fewest collectives: it holds up the others, which wait for it in one that it has not begun.

    Args:
        rank: This one.
        world: Number of ranks; rank ``rank + 1`` is looked after.
        timeout: Seconds that this rank waits in a collective before it looks for one that hangs.
        end: Ends this process with a message.
    """

    def __init__(self, rank: int, world: int, timeout: float, end: Callable[[str], NoReturn]) -> None:
        super().__init__(daemon=True, name="rank-watch")
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=PATIENCE_SECONDS)
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=patience)
        # A restarted run may meet in the store of the run before it.
        self._store = dist.PrefixStore(f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self._rank, self._world, self._next = rank, world, (rank + 1) % world
        # Low ranks look first, and one message reaches all before the next looks.
        self._timeout = timeout + 2 * BEAT_SECONDS * min(rank, 2)
        self._end = end
        self._begun, self._begun_at = 0, time.monotonic()
        self._ended = threading.Event()
        self._lost = threading.Event()
        self._message = ""

    def start(self) -> None:
        """Begin to beat. At exit it ends before the interpreter does.

        Python unwinds threads that want to go on after it; one that is in the store then aborts the whole process.
        """
        super().start()
        atexit.register(self.end)

    def run(self) -> None:
        """Beat and look until this rank ends."""
        beat, seen, changed = 0, b"", time.monotonic()
        self._set(f"host/{self._rank}", f"process {os.getpid()} on {socket.gethostname()}")
        while not self._ended.wait(BEAT_SECONDS) and not self._lost.is_set():
            beat += 1
            self._set(f"beat/{self._rank}", str(beat))
            latest = self._get(f"beat/{self._next}")
            if latest != seen or latest == b"ended":
                seen, changed = latest, time.monotonic()
            elif time.monotonic() - changed > PATIENCE_SECONDS:
                self._set("lost", f"{self._identify(self._next)} is gone: no sign of life for {PATIENCE_SECONDS:.0f} s")
            self._look_at_progress()
            self._note_loss(self._get("lost").decode())
        if not self._ended.wait(GRACE_SECONDS):
            self._end(self._message)

    def _look_at_progress(self) -> None:
        """Say how far this rank is; once it has waited too long, name the one that it waits for."""
        begun, now = collectives_begun(), time.monotonic()
        self._set(f"begun/{self._rank}", f"{begun} {_where_main_thread_is()}")
        if begun != self._begun:
            self._begun, self._begun_at = begun, now
        elif now - self._begun_at > self._timeout and not self._get("lost"):
            self._begun_at = now
            places = [self._get(f"begun/{rank}").decode().partition(" ") for rank in range(self._world)]
            counts = [int(count or 0) for count, _, _ in places]
            if min(counts) < max(counts):
                slowest = counts.index(min(counts))
                self._set("lost", f"{self._identify(slowest)} hangs in {places[slowest][2]}: the others wait for it")

    def _identify(self, rank: int) -> str:
        return f"rank {rank} ({self._get(f'host/{rank}').decode()})"

    def end(self) -> None:
        """This rank is about to end, as it should. Once more does nothing."""
        if not self._ended.is_set():
            self._ended.set()
            self._set(f"beat/{self._rank}", "ended")
        self.join(PATIENCE_SECONDS + GRACE_SECONDS)

    def fail(self, error: BaseException) -> None:
        """This rank ends with ``error``; where the reason is another rank, that one is named and the process ended."""
        communication = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
        if communication and self._lost.wait(PATIENCE_SECONDS + GRACE_SECONDS):
            self._end(self._message)
        if not self._lost.is_set():
            text = " ".join(str(error).split()) or type(error).__name__
            self._set("lost", f"rank {self._rank} failed: {text}")

    def _note_loss(self, message: str) -> None:
        if message:
            self._message = message
            self._lost.set()

    def _set(self, key: str, value: str) -> None:
        self._try(lambda: self._store.set(key, value))

    def _get(self, key: str) -> bytes:
        return self._try(lambda: self._store.get(key) if self._store.check([key]) else b"") or b""

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError:
            self._note_loss("rank 0 is gone, or whoever holds the store in which the processes met: it does not answer")
            return None


class Launcher(_SubprocessScriptLauncher):
    """Starts the other processes of this machine; if one of them is lost, names it and ends all.

    Lightning's own ends them without a word.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the others, then call ``function``."""
        threads = os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // self.num_processes, 1)))
        torch.set_num_threads(int(threads))
        self._call_children_scripts()
        threading.Thread(target=self._supervise, daemon=True, name="launcher").start()
        return function(*args, **kwargs)

    def _supervise(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS / 2)
            for rank, process in enumerate(self.procs, start=1):
                if process.poll() not in (None, 0, REQUEUE):
                    # Where all ranks fail alike, this process ends with the error itself.
                    time.sleep(GRACE_SECONDS)
                    self.end(f"rank {rank} (process {process.pid}) {_ending(process.returncode)}")

    def end(self, message: str) -> NoReturn:
        """End the other processes, also one that is stopped, and this one."""
        self.kill(signal.SIGKILL)
        end_process(message)


def _where_main_thread_is() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return f"{frame.f_code.co_name} ({frame.f_code.co_filename}, line {frame.f_lineno})" if frame else "its end"


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def end_process(message: str) -> NoReturn:
    """Say why and end at once, without waiting for any thread, collective or exit handler."""
    print(f"zoo: error: {message}; run the same command again to go on from the latest checkpoint", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)
