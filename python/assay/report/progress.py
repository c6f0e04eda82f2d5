"""Progress with an estimate of the time left, on stderr.

Work is weighed in expected seconds, so that the estimate is right though points differ a thousandfold in length.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import IO, Any, Self, TypeVar

T = TypeVar("T")
LINE_EVERY_S = 5.0


class Progress:
    """A bar on a terminal; silent elsewhere, unless asked for: then one line every 5 seconds.

    Parameters
    ----------
    total_s
        Expected seconds of all work.
    title
        What is being done.
    show
        None: a bar if the stream is a terminal, else nothing. True: a bar or lines. False: nothing.
    stream, clock
        Where to write (stderr when left out) and what tells the time, in seconds.
    """

    def __init__(
        self,
        total_s: float,
        title: str,
        show: bool | None = None,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_s
        self._title = title
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._done = 0.0
        self._start = self._last = clock()
        terminal = self._stream.isatty()
        self._lines = bool(show) and not terminal
        self._bar: Any = None
        if terminal and show is not False:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_s,
                desc=title,
                file=self._stream,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} done, {remaining} left{postfix}",
                leave=False,
            )

    def advance(self, weight_s: float, note: str = "") -> None:
        """Count work of ``weight_s`` expected seconds as done; ``note`` says what comes now or what it was."""
        self._done = min(self._done + weight_s, self._total)
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(self._done - self._bar.n)
        elif self._lines and self._clock() - self._last >= LINE_EVERY_S:
            self._last = self._clock()
            self._line(note)

    def _line(self, note: str) -> None:
        elapsed = self._clock() - self._start
        left = elapsed * (self._total - self._done) / self._done if self._done > 0 else self._total
        share = 100 * self._done / self._total if self._total > 0 else 100.0
        tail = f", {note}" if note else ""
        print(
            f"{self._title}: {share:.0f}%, {elapsed:.0f} s done, {left:.0f} s left{tail}", file=self._stream, flush=True
        )

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def track(
    items: Iterable[T], weights: Sequence[float], title: str, show: bool | None = None, stream: IO[str] | None = None
) -> Iterator[T]:
    """Yield the items, counting each as done (its weight in seconds of work) when the next is asked for."""
    with Progress(sum(weights), title, show, stream) as progress:
        for item, weight_s in zip(items, weights, strict=True):
            yield item
            progress.advance(weight_s)
