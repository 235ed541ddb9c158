# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Progress with an estimate of the time that is left: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """A context manager that shows ``description``, how far it is, the time left and a short note.

    Args:
        description: what is going on, in a few words.
        total: number of steps; ``None`` where it is not known.
        interval: seconds between two lines where the output is not a terminal.
    """

    def __init__(self, description: str, total: int | None = None, interval: float = 15.0) -> None:
        self.description, self.total, self.interval = description, total, interval
        self.done = self.shown = 0
        self.note = ""

    def __enter__(self) -> Progress:
        self.started = self.printed = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn())
            times = (TimeElapsedColumn(), "eta", TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
            self.bar = RichProgress(*columns, *times, console=Console(stderr=True), transient=False)
            self.bar.start()
            self.task = self.bar.add_task(self.description, total=self.total, note="")
        return self

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Reports that ``steps`` more are done."""
        self.done += steps
        self.note = note or self.note
        if self.bar is not None:
            self.bar.update(self.task, advance=steps, note=self.note)
            return
        now = time.monotonic()
        if now - self.printed >= self.interval:
            self.printed, self.shown = now, self.done
            print(self.line(now - self.started), file=sys.stderr, flush=True)

    def line(self, elapsed: float) -> str:
        """One line of a log: description, count, elapsed time, estimate, note."""
        text = f"{self.description}: {self.done}" + (f"/{self.total}" if self.total else "") + f" in {clock(elapsed)}"
        if self.total and 0 < self.done < self.total:
            text += f", about {clock(elapsed / self.done * (self.total - self.done))} left"
        return f"{text}  {self.note}".rstrip()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        elif time.monotonic() - self.started >= 2 and self.shown < self.done:
            print(self.line(time.monotonic() - self.started), file=sys.stderr, flush=True)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterates over ``items`` and shows progress."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(description, total) as progress:
        for item in items:
            yield item
            progress.advance()
