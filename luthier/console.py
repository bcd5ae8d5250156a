"""How a run sounds in a terminal: bars with the time that is left; plain lines when it is not one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from luthier.narrate import Bar, Narrator, Plain


def narrator(*, to_stderr: bool = False) -> Narrator:
    """Rich in a terminal, plain lines in a pipe or a file."""
    stream = sys.stderr if to_stderr else sys.stdout
    return Terminal(stream) if stream.isatty() else Piped(stream)


class Piped(Plain):
    """Plain lines to one stream."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def line(self, text: str = "") -> None:
        print(text, file=self._stream, flush=True)

    def show(self, thing: Any) -> None:
        self.line(thing.summary() if hasattr(thing, "summary") else str(thing))


class Terminal:
    """Progress bars that appear when something takes over two seconds, and lines above them."""

    def __init__(self, stream: Any) -> None:
        from rich.console import Console

        self._console = Console(file=stream, highlight=False, soft_wrap=True)

    def line(self, text: str = "") -> None:
        style = "yellow" if text.startswith("warning") else None
        self._console.print(text, style=style, markup=False)

    def show(self, thing: Any) -> None:
        self.line(thing.summary() if hasattr(thing, "summary") else str(thing))

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[say]}"),
        )
        progress = Progress(*columns, console=self._console, transient=False)
        task = progress.add_task(label, total=total, say="")
        shown = _Shown(progress, task)
        try:
            yield shown
        finally:
            shown.close()

    @contextmanager
    def live(self, make: Callable[[], Any]) -> Iterator[None]:
        from rich.live import Live

        with Live(get_renderable=make, console=self._console, refresh_per_second=2, transient=True):
            yield


class _Shown:
    """A bar that is drawn once two seconds have gone by."""

    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task
        self._begun, self._live = time.monotonic(), False

    def advance(self, by: int = 1, *, say: str = "") -> None:
        self._progress.update(self._task, advance=by, say=say)
        if not self._live and time.monotonic() - self._begun > 2.0:
            self._progress.start()
            self._live = True

    def close(self) -> None:
        if self._live:
            self._progress.stop()
