"""An environment in a process of its own, so that its death is not the run's.

Both sides send messages over a pair of sockets: eight bytes of length, then a pickle. Only the two ends of
this program can write to it. The process ends

- when the parent closes the connection or no longer exists;
- when it does not answer: the parent kills it after the timeout, or, without a parent, a watchdog in the
  process ends it later. The watchdog does not need the interpreter, so it also ends a hang in a C library.

SIGINT and SIGTERM are blocked in it. A terminal sends them to all processes of a program, and the parent
needs the environments to finish its step and save.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium

from rem_atari.envs.host import SingleEnv, describe_exception
from rem_atari.errors import EnvironmentAnswerError, EnvironmentDiedError

START_SECONDS = 60.0
"""Seconds that a process may take to start, build its environment and give its first answer."""

CLOSE_SECONDS = 2.0
"""Seconds that an environment may take to close before its process is killed."""

_NOWHERE = os.open(os.devnull, os.O_WRONLY)

_LENGTH = struct.Struct("<Q")

_BOOT = "import sys; sys.path[:] = {path!r}; from rem_atari.envs.process import serve; serve({descriptor})"


class ProcessHost:
    """An environment in a process of its own.

    Args:
        make: builds the environment; picklable, and importable where it's unpickled.
        timeout: seconds that an answer may take, once the environment has given its first one.
    """

    def __init__(self, make: Callable[[], gymnasium.Env], *, timeout: float) -> None:
        self._timeout = timeout
        self._deadline = 0.0
        self._has_answered = False
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = _start_process(theirs)
        self._deadline = time.monotonic() + START_SECONDS
        self._tell((make, timeout))

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def start(self, method: str, *arguments: Any) -> None:
        """As `EnvHost.start`."""
        self._deadline = time.monotonic() + (self._timeout if self._has_answered else START_SECONDS)
        self._tell((method, arguments))

    def finish(self) -> Any:
        """As `EnvHost.finish`."""
        try:
            kind, content = _receive(self._socket, self._deadline)
        except TimeoutError as error:
            raise EnvironmentDiedError(self._describe_silence()) from error
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise EnvironmentDiedError(self._describe_death()) from error
        if kind == "raised":
            raise EnvironmentDiedError(content)
        if kind == "refused":
            raise EnvironmentAnswerError(content)
        self._has_answered = True
        return content

    def begin_close(self) -> None:
        """As `EnvHost.begin_close`."""
        self._socket.close()

    def close(self) -> None:
        """As `EnvHost.close`; a process that still runs after `CLOSE_SECONDS` is killed."""
        self._socket.close()
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.discard()

    def discard(self) -> None:
        """As `EnvHost.discard`."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _tell(self, message: Any) -> None:
        # `finish` finds a dead or hanging process and explains it.
        with contextlib.suppress(OSError):
            _send(self._socket, message, self._deadline)

    def _describe_silence(self) -> str:
        seconds = self._timeout if self._has_answered else START_SECONDS
        return f"its process {self.pid} did not answer within {seconds:g} s"

    def _describe_death(self) -> str:
        """How the process ended; a socket closes just before that, so it may need a moment."""
        try:
            code = self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            return f"its process {self.pid} hung up"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"its process {self.pid} {how}"


def _start_process(theirs: socket.socket) -> subprocess.Popen[bytes]:
    boot = _BOOT.format(path=sys.path, descriptor=theirs.fileno())
    # A process inherits its blocked signals from the thread that starts it.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        # Its output goes to stderr, because another program may read the program's own on stdout.
        return subprocess.Popen(
            [sys.executable, "-c", boot], pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=2
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def serve(descriptor: int) -> None:
    """The process's whole life: build the environment and do what the parent asks until it hangs up."""
    parent = socket.socket(fileno=descriptor)
    env: SingleEnv | None = None
    try:
        make, timeout = _receive(parent, None)
        patience = START_SECONDS
        while True:
            method, arguments = _receive(parent, None)
            try:
                with _watchdog(patience):
                    env = SingleEnv(make()) if env is None else env
                    answer = ("done", getattr(env, method)(*arguments))
            except EnvironmentAnswerError as error:
                answer = ("refused", str(error))
            except (Exception, SystemExit) as error:
                answer = ("raised", describe_exception(error))
            _send(parent, answer, None)
            patience = 2 * timeout
    except (EOFError, ConnectionError):
        pass  # the parent closed the connection or is gone
    except Exception as error:  # the function that builds the environment cannot be unpickled
        _send(parent, ("raised", describe_exception(error)), None)
    if env is not None:
        with _watchdog(CLOSE_SECONDS):
            env.close()


@contextmanager
def _watchdog(seconds: float) -> Iterator[None]:
    """End the process if the block takes longer; discard the watchdog's output."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=_NOWHERE)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _send(channel: socket.socket, message: Any, deadline: float | None) -> None:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    _set_time_left(channel, deadline)
    channel.sendall(_LENGTH.pack(len(data)) + data)


def _receive(channel: socket.socket, deadline: float | None) -> Any:
    """The next message.

    Raises:
        TimeoutError: it did not arrive whole before the deadline (of `time.monotonic`; None: none).
        EOFError: the other end is closed.
    """
    (length,) = _LENGTH.unpack(_receive_exactly(channel, _LENGTH.size, deadline))
    return pickle.loads(_receive_exactly(channel, length, deadline))


def _receive_exactly(channel: socket.socket, size: int, deadline: float | None) -> bytes:
    data = bytearray(size)
    done = 0
    while done < size:
        _set_time_left(channel, deadline)
        received = channel.recv_into(memoryview(data)[done:])
        if received == 0:
            raise EOFError
        done += received
    return bytes(data)


def _set_time_left(channel: socket.socket, deadline: float | None) -> None:
    # A timeout of 0 means non-blocking mode, which raises a different error.
    channel.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-3))
