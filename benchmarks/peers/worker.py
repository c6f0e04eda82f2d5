"""A contender in a process of its own, so that its threads are its own, driven over pipes.

The process is stopped (SIGSTOP) whenever it is not its turn: no thread of a contender that waits disturbs another.
"""

import ctypes
import importlib
import os
import pickle
import signal
import statistics
import subprocess
import sys
import traceback
from pathlib import Path
from time import monotonic
from typing import Any

from .contender import Cell

HOME = Path(__file__).resolve().parents[1]
PR_SET_PDEATHSIG = 1
#: Longest that calls are made before a visit is timed: calls that take so long do not wait for memory.
WARM_S = 1.0


class Failed(Exception):  # noqa: N818
    """What a worker said instead of an answer."""


class Worker:
    """One contender's process.

    Parameters
    ----------
    target
        "module:Class" of the contender, and its arguments, as ("peers.ours:Assay", ()).
    cores
        Threads are pinned to the first `cores` CPUs, one each.
    """

    def __init__(self, target: str, arguments: tuple[Any, ...], cores: int) -> None:
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HOME), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_PROC_BIND": "true",
            "OMP_PLACES": ",".join(f"{{{cpu}}}" for cpu in sorted(os.sched_getaffinity(0))[:cores]),
            "OMP_NUM_THREADS": str(cores),
            "OPENBLAS_NUM_THREADS": str(cores),
        }
        command = [sys.executable, "-c", "from peers.worker import serve; serve()"]
        noise = None if os.environ.get("ASSAY_PEER_TRACE") else subprocess.DEVNULL
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            env=env,
            cwd=HOME,
            start_new_session=True,
        )
        self._stopped = False
        self._send((target, arguments))

    def _send(self, message: Any) -> None:
        assert self._process.stdin
        self._wake()
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it died of is said where its answer is read

    def _wake(self) -> None:
        if self._stopped:
            os.kill(self._process.pid, signal.SIGCONT)
            self._stopped = False

    def start(self, method: str, *arguments: Any) -> None:
        """Asks for something; the answer is fetched by :meth:`finish`."""
        self._send((method, arguments))

    def finish(self) -> Any:
        """The answer; the process is stopped when it has come.

        Raises
        ------
        Failed
            The contender raised, or its process died.
        """
        assert self._process.stdout
        try:
            good, value = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            raise Failed(f"its process ended with {code}") from None
        os.kill(self._process.pid, signal.SIGSTOP)
        self._stopped = True
        if not good:
            raise Failed(value)
        return value

    def ask(self, method: str, *arguments: Any) -> Any:
        """:meth:`start` and :meth:`finish`."""
        self.start(method, *arguments)
        return self.finish()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


class Server:
    """The worker's side: holds the contender and the cell that is prepared."""

    def __init__(self, target: str, arguments: tuple[Any, ...]) -> None:
        module, _, name = target.partition(":")
        self._contender = getattr(importlib.import_module(module), name)(*arguments)
        self._timer: Any = None
        self._prepared: Any = None

    def versions(self) -> dict[str, str]:
        return self._contender.versions()

    def prepare(self, cell: Cell) -> tuple[str | None, float, float]:
        """(why not, or None; relative error; the most that is allowed)."""
        from assay.measure.clock import Timer

        self._timer = self._prepared = None
        reason = self._contender.refuses(cell)
        if reason:
            return reason, 0.0, 0.0
        prepared = self._contender.prepare(cell)
        error = prepared.error()
        if error <= prepared.tolerance:
            self._prepared, self._timer = prepared, Timer(prepared.calls)
        return None, error, prepared.tolerance

    def visit(self, budget_s: float) -> float:
        """Seconds a computation of the cell: median of a visit.

        Every call is made once before, since memory that lay idle while others had their turns is slow when it is touched again.
        """
        until = monotonic() + WARM_S
        for call in self._prepared.calls:
            call()
            if monotonic() > until and not self._prepared.warm:
                break
        del self._timer.samples[:]
        self._timer.visit(budget_s, min_samples=3, max_samples=9)
        return statistics.median(self._timer.samples) / self._prepared.per_call

    def roofs(self, threads: int) -> dict[str, float]:
        """Of the worker that reads roofs: those of this moment."""
        return self._contender.read(threads)


def serve() -> None:
    """Answers on the first standard output; whatever a library prints goes to standard error."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    server: Server | None = None
    while True:
        try:
            message = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            if server is None:
                server = Server(*message)
                reply = (True, server.versions())
            else:
                method, arguments = message
                reply = (True, getattr(server, method)(*arguments))
        except Exception as exc:  # noqa: BLE001 (reported to the parent, which shows it)
            if os.environ.get("ASSAY_PEER_TRACE"):
                traceback.print_exc()
            reply = (False, f"{type(exc).__name__}: {exc}".splitlines()[0][:300])
        pickle.dump(reply, answers)
        answers.flush()
        if server is None:
            return
