"""Read files in processes of their own, so that a crash, a hang or a memory bomb costs one file and not the run.

A process reads one file after the other and is replaced when it dies or exceeds its time. Requests and results are pickled
through its standard input and output. `multiprocessing` is not used: its pool breaks when a process dies, and it imports
the caller's main module again. A process imports what reading needs, which takes 0.3 s; with torch it would take 2 s.
"""

import asyncio
import contextlib
import ctypes
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from minigpt3d.arguments import number_between, option
from minigpt3d.messages import one_line
from minigpt3d.readers_minigpt3d import PointCloudError, ReadingLimits, limited, printable
from minigpt3d.sources_minigpt3d import is_url, local_file, source_name


# Paths that wait for each process; more would only hold more results in memory.
LOOKAHEAD = 4
# What a process is allowed beyond its time before it ends itself, in case that its parent has died.
GRACE_SECONDS = 5


class CrashError(PointCloudError):
    """Reading a file ended its process or exceeded its time."""


class Limits(NamedTuple):
    """What reading one file may take; large files are allowed more (docs/reading.md lists the values). A URL is downloaded
    first, within limits of its own.

    Args:
        seconds: by the clock.
        memory: bytes of address space.
        seconds_per_mb: more seconds for each megabyte of the file.
        memory_per_byte: more memory for each byte of the file.
        max_download_seconds, max_download_bytes: see `ReadingLimits`.
    """

    seconds: float = 60
    memory: int = 4 * 1024**3
    seconds_per_mb: float = 1
    memory_per_byte: int = 16
    max_download_seconds: float = ReadingLimits.max_download_seconds
    max_download_bytes: int = ReadingLimits.max_download_bytes

    def of(self, path: str | Path) -> tuple[float, int]:
        """Seconds and bytes of memory for this file; for a URL, whose size is not known yet, the most seconds."""
        if is_url(path):
            return self.max_download_seconds + self._seconds(self.max_download_bytes), self.memory
        try:
            size = os.stat(path).st_size
        except (OSError, ValueError):  # the reader says what is wrong with it
            size = 0
        return self._seconds(size), self.memory + self.memory_per_byte * size

    def _seconds(self, size: int) -> float:
        return self.seconds + self.seconds_per_mb * size / 1e6


LIMITS = Limits()


@dataclass(kw_only=True)
class LimitOptions:
    """The options of every command that reads files in processes of their own; the defaults are `LIMITS`."""

    max_seconds: float | None = option(
        f"seconds for reading a file, and {LIMITS.seconds_per_mb:g} more for each megabyte of it (default: "
        f"{LIMITS.seconds:g})",
        default=None,
        type=number_between(0.1, 1e6),
        metavar="SECONDS",
    )
    max_memory: float | None = option(
        f"GiB of memory for reading a file, and {LIMITS.memory_per_byte} times its size (default: "
        f"{LIMITS.memory / 1024**3:g}; on Linux only)",
        default=None,
        type=number_between(0.1, 1e6),
        metavar="GIB",
    )

    @property
    def limits(self) -> Limits:
        limits = LIMITS
        if self.max_seconds is not None:
            limits = limits._replace(seconds=self.max_seconds)
        if self.max_memory is not None:
            limits = limits._replace(memory=int(self.max_memory * 1024**3))
        return limits


@dataclass(frozen=True)
class FileResult:
    """What came of a file.

    Args:
        path: as it was passed.
        content: what the function returned; None if it failed.
        error: why it failed; its message names the file.
        warnings: texts of the warnings for users.
        seconds: how long it took.
        memory: the most bytes that the process had in memory up to then; 0 if it died.
    """

    path: str | Path
    content: Any = None
    error: ValueError | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    memory: int = 0


class FileReader:
    """Calls a function on files, in other processes.

    ```python
    with FileReader(load_point_cloud) as reader:
        for result in reader.read_files(paths, num_points=1024):
            print(result.path, result.error or result.content.shape)
    ```

    Args:
        function: (path, **arguments) → what is needed of the file. Pickled, so it is defined in a module.
        num_processes: they start at once.
        limits: of one file; `LIMITS` by default.
    """

    def __init__(self, function: Callable, num_processes: int = 1, limits: Limits | None = None):
        self._processes = [_Process(function, limits or LIMITS) for _ in range(num_processes)]
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(num_processes)

    def __enter__(self) -> "FileReader":
        return self

    def __exit__(self, *error):
        for process in self._processes:
            process.close()
        self._threads.shutdown(cancel_futures=True)

    def _submit(self, task: "_Task") -> "Future[FileResult]":
        return self._threads.submit(self._read, task)

    async def read(self, path: str | Path, **arguments) -> FileResult:
        """Read one file as soon as a process is free. If this is cancelled, reading ends. Raises as `read_files`."""
        task = _Task(path, arguments)
        try:
            return await asyncio.wrap_future(self._submit(task))
        except asyncio.CancelledError:
            task.stop()
            raise

    def read_files(self, paths: Iterable[str | Path], ahead: int = LOOKAHEAD, **arguments) -> Iterator[FileResult]:
        """Results in the order of the paths. While one is looked at, the next `ahead` for each process are read.

        Raises:
            OSError: a process cannot be started.
        """
        waiting = deque()
        try:
            for path in paths:
                waiting.append(self._submit(_Task(path, arguments)))
                if len(waiting) > ahead * len(self._processes):
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        finally:
            for future in waiting:
                future.cancel()

    def _read(self, task: "_Task") -> FileResult:
        process = self._idle.get()
        try:
            return process.read(task)
        finally:
            self._idle.put(process)


def _result(future: Future) -> FileResult:
    """The result, waited for in short turns: a Ctrl-C that comes just before the wait does not interrupt it."""
    while not wait([future], timeout=0.5).done:
        pass
    return future.result()


class _Task:
    """A file that is to be read.

    Attributes:
        process: what reads it, while it does.
    """

    def __init__(self, path: str | Path, arguments: dict):
        self.path, self.arguments = path, arguments
        self.process: subprocess.Popen | None = None
        self.is_stopped, self._lock = False, threading.Lock()

    def stop(self):
        """End the process that reads it, or let none begin."""
        with self._lock:
            self.is_stopped = True
            if self.process is not None:
                self.process.kill()

    @contextlib.contextmanager
    def read_by(self, process: subprocess.Popen) -> Iterator[bool]:
        """Whether it is to be read; within this context `stop` ends the process."""
        with self._lock:
            self.process = None if self.is_stopped else process
        try:
            yield self.process is not None
        finally:
            with self._lock:
                self.process = None


class _Process:
    """The parent's side of one process."""

    # The path of modules is that of the parent, as for `multiprocessing`.
    PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from minigpt3d.data.reading import serve; serve()"

    def __init__(self, function: Callable, limits: Limits):
        self._function, self._limits = function, limits
        self._closed = self._has_expired = False
        self._start()

    def _start(self):
        self._is_ready, self._log = False, tempfile.TemporaryFile()
        # Of its own, since a process that is ended leaves what it has downloaded or unpacked.
        self._folder = tempfile.TemporaryDirectory(prefix="minigpt3d-", ignore_cleanup_errors=True)
        # Threads of BLAS reserve address space for each core, and reading has no use for them.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TMPDIR": self._folder.name}
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
        )
        with contextlib.suppress(BrokenPipeError):  # it is noticed when it does not answer
            self._send(self._function)

    def read(self, task: _Task) -> FileResult:
        if self._process.poll() is not None and self._is_ready:
            self._discard()
            if self._closed:
                raise RuntimeError("This reader is closed.")
            self._start()
        self._wait_until_ready()
        with task.read_by(self._process) as is_wanted:
            if not is_wanted:
                return FileResult(
                    task.path, error=PointCloudError(f"{source_name(task.path)}: reading it was stopped.")
                )
            return self._answer(task.path, task.arguments)

    def _answer(self, path: str | Path, arguments: dict) -> FileResult:
        seconds, memory = self._limits.of(path)
        self._has_expired = False
        timer = threading.Timer(seconds, self._expire)
        start = time.monotonic()
        timer.start()
        try:
            self._send((path, arguments, self._limits))
            result = pickle.load(self._process.stdout)
        except Exception:  # the end of its output, or the beginning of a result
            result = FileResult(path, error=self._post_mortem(path, seconds, memory))
        finally:
            timer.cancel()
            if self._has_expired:  # it may have answered at the last moment
                self._process.wait()
        return replace(result, seconds=time.monotonic() - start)

    def close(self):
        self._closed = True
        self._discard()

    def _send(self, message: Any):
        pickle.dump(message, self._process.stdin)
        self._process.stdin.flush()

    def _wait_until_ready(self):
        """
        Raises:
            OSError: it has ended before it could read a file.
        """
        if self._is_ready:
            return
        try:
            pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError) as error:
            self._process.kill()
            self._process.wait()
            self._log.seek(0)
            lines = self._log.read().decode(errors="replace").split("\n")
            reason = next((line for line in reversed(lines) if line.strip()), f"code {self._process.returncode}")
            raise OSError(f"The process that reads files did not start: {reason.strip()}") from error
        self._is_ready = True

    def _expire(self):
        self._has_expired = True
        self._process.kill()

    def _post_mortem(self, path: str | Path, seconds: float, memory: int) -> CrashError:
        self._process.kill()
        code = self._process.wait()
        name = source_name(path)
        if self._has_expired or code == -getattr(signal, "SIGALRM", 0):
            allowed = "the time allowed for its size" if is_url(path) else f"{seconds:.0f} seconds"
            return CrashError(f"{name}: it was not read within {allowed}. It is damaged, or far too detailed.")
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return CrashError(
            f"{name}: reading it crashed ({cause}). It is damaged, or needs more than the {memory / 1024**3:.1f} GiB of "
            "memory allowed for a file of its size."
        )

    def _discard(self):
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._log):
            with contextlib.suppress(OSError):  # what was not sent yet
                stream.close()
        self._folder.cleanup()


# ---- In the process -------------------------------------------------------------------------------------------------


def serve():
    """Read files as long as the parent asks; the first message is the function."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent decides
    requests, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    function = pickle.load(requests)
    _send(results, "ready")
    for stream in (1, 2):  # what libraries print is no use to anybody
        os.dup2(null, stream)
    waiting: queue.SimpleQueue[tuple] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests, waiting), daemon=True).start()
    while True:
        path, arguments, limits = waiting.get()
        result = _read(function, path, arguments, limits)
        _limit(0, limits.memory)
        _send(results, result)


def end_with_parent():
    """Let the system kill this process when its parent has ended, whatever it does then; only Linux can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _send(results, message: Any):
    pickle.dump(message, results)
    results.flush()


def _receive(requests, waiting: queue.SimpleQueue):
    """A thread of its own, so that the process ends with its parent in the middle of a file, too; on systems without
    `end_with_parent` only where the reader lets other threads run."""
    try:
        while True:
            waiting.put(pickle.load(requests))
    finally:
        os._exit(0)


@dataclass(frozen=True)
class _Download(os.PathLike):
    """A file, and what messages call it."""

    path: Path
    name: str

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return self.name


@contextlib.contextmanager
def _file(source: str | Path, limits: Limits) -> Iterator[str | os.PathLike]:
    """A source as it is or, of a URL, what is downloaded from it; this process is limited by the size of the file."""
    seconds, memory = limits.of(source)
    _limit(seconds + GRACE_SECONDS, memory)
    if not is_url(source):
        yield source
        return
    download = ReadingLimits(
        max_download_seconds=limits.max_download_seconds, max_download_bytes=limits.max_download_bytes
    )
    with contextlib.ExitStack() as stack:
        try:
            with limited(download):
                path = stack.enter_context(local_file(source))
        except PointCloudError as error:
            raise type(error)(f"{source_name(source)}: {printable(str(error))}") from error
        seconds, memory = limits.of(path)
        _limit(seconds, memory)
        yield _Download(path, source_name(source))


def _limit(seconds: float, memory: int):
    """Limit the memory of this process, and end it after some seconds, whatever it does then; 0 stops the clock."""
    try:
        import resource
    except ImportError:  # Windows has neither
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses some
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        allowed = used + memory
        resource.setrlimit(
            resource.RLIMIT_AS, (allowed if most == resource.RLIM_INFINITY else min(allowed, most), most)
        )


def _read(function: Callable, path: str | Path, arguments: dict, limits: Limits) -> FileResult:
    content = error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with _file(path, limits) as source:
                content = function(source, **arguments)
        except PointCloudError as failure:
            error = failure
        except MemoryError:
            error = "it needs more memory than is allowed for a file of its size; it is damaged or too large."
        except BaseException as failure:  # a reader may raise anything, also what is no Exception
            error = one_line(failure)
    if isinstance(error, str):
        error = PointCloudError(f"{source_name(path)}: {printable(error.removeprefix(f'{path}: '))}")
    texts = dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning)
    return FileResult(path, content, error, tuple(texts), memory=_peak_memory())


def _peak_memory() -> int:
    """Of this process. Linux's `ru_maxrss` begins with the memory of the parent."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith("VmHWM:")).split()[1])
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
