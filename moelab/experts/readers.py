"""The open files of a checkpoint, and threads that read from them together.

An interrupt may come at any moment between two instructions of the calling thread, while others
read. So what must be waited for is not what the caller remembers to have started but what has in
fact begun, and each thread says that itself.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CheckpointError

THREADS = 4
"""Readers at once. More than two gain little when the page cache is warm, more than four little
when it is not."""

_Job = TypeVar("_Job")


class Files:
    """The open shards of one checkpoint, shared by the layers that read from it.

    Args:
        threads: Readers at once, the calling thread among them.
    """

    def __init__(self, threads: int = THREADS) -> None:
        self.threads = threads
        self._fds: dict[Path, int] = {}
        self._opened: dict[int, tuple[Path, int, int]] = {}
        """Path, size and time of last change, when a file was opened."""
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def fd(self, path: Path) -> int:
        """Returns a file descriptor of `path`, open for reading."""
        fd = self._fds.get(path)
        if fd is None:
            with self._lock:
                if path not in self._fds:
                    fd = os.open(path, os.O_RDONLY)
                    state = os.fstat(fd)
                    self._opened[fd] = path, state.st_size, state.st_mtime_ns
                    self._fds[path] = fd
                fd = self._fds[path]
        return fd

    def check(self, fds: Iterable[int]) -> None:
        """Refuses files that were written to since they were opened.

        A file that another has *replaced* under its name is fine: the old one stays open, whole.

        Raises:
            CheckpointError: If a file's size or time of last change is another.
        """
        for fd in fds:
            state = os.fstat(fd)
            path, nbytes, changed = self._opened[fd]
            if state.st_mtime_ns != changed or state.st_size != nbytes:
                raise CheckpointError(
                    f"{path} was written to since the model was loaded, so what is read from it "
                    "may belong to another model. Load the model again."
                )

    @property
    def pool(self) -> ThreadPoolExecutor:
        """The reading threads, started when first needed."""
        if self._pool is None:
            helpers = max(1, self.threads - 1)  # the calling thread reads too
            self._pool = ThreadPoolExecutor(helpers, thread_name_prefix="moelab-read")
        return self._pool

    def close(self) -> None:
        """Stops the readers and closes the files."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None
        while self._fds:
            os.close(self._fds.popitem()[1])
        self._opened.clear()


class Batch:
    """Jobs that several threads do, each taking the next when it is done with one."""

    def __init__(self) -> None:
        self._jobs: deque[Any] = deque()
        self._helping: list[threading.Event] = []
        """One for each thread that began to help; set when it has stopped."""
        self._errors: list[BaseException] = []

    def work(self, files: Files, jobs: Sequence[_Job], do: Callable[[_Job], None]) -> None:
        """Does all jobs, with the help of the files' threads, and returns when all are done.

        Raises:
            BaseException: What the first job that failed raised; no more are begun then.
        """
        self._jobs.extend(jobs)
        for _ in range(min(files.threads, len(jobs)) - 1):
            files.pool.submit(self._help, do)
        self._drain(do)
        self.wait()
        if self._errors:
            raise self._errors[0]

    def abandon(self) -> None:
        """Begins no more jobs and waits for those that were begun."""
        self._jobs.clear()
        self.wait()

    def wait(self) -> None:
        """Waits for the helpers that have begun. One that begins later finds nothing to do."""
        for stopped in list(self._helping):
            stopped.wait()

    def _help(self, do: Callable[[Any], None]) -> None:
        stopped = threading.Event()
        # Before it takes a job: whoever empties the queue after that knows of this thread.
        self._helping.append(stopped)
        try:
            self._drain(do)
        except BaseException as error:
            self._errors.append(error)
        finally:
            stopped.set()

    def _drain(self, do: Callable[[Any], None]) -> None:
        try:
            while True:
                try:
                    job = self._jobs.popleft()
                except IndexError:
                    return
                do(job)
        except BaseException:
            self._jobs.clear()
            raise
