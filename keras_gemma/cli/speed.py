"""Speed and memory of a generated text, for `--benchmark`."""

import sys
import time

from keras_gemma.benchmark import memory
from keras_gemma.cli.printing import plural

MIN_PIECES = 8
"""Minimum number of pieces for a speed of the second half."""


class Watch:
    """Stopwatch that starts when it is created."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []

    def piece(self) -> None:
        """Records the time of a piece of text."""
        self.times.append(time.perf_counter() - self.start)

    def report(self, read: int, cached: int, new: int) -> None:
        """Prints a line to stderr: tokens read, cached and new, time, speed and peak memory.

        The second half of a streamed text shows the speed without compilation.
        """
        seconds = time.perf_counter() - self.start
        first = f", first token after {self.times[0]:.2f} s" if self.times else ""
        reused = f" ({cached} reused from the cache)" if cached else ""
        speed = f"{new / seconds:.1f} tokens/s"
        if len(self.times) >= MIN_PIECES:
            half = len(self.times) // 2
            share = half / len(self.times)
            speed += f", {new * share / (self.times[-1] - self.times[-1 - half]):.1f} in the "
            speed += "second half"
        peak = memory.peak()
        if peak is not None:
            speed += f"; peak memory {peak / 1e9:.2f} GB"
        print(
            f"{plural(read, 'token')} read{reused}, {new} generated in {seconds:.2f} s{first}: "
            f"{speed}",
            file=sys.stderr,
        )
