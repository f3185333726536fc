"""Speed of a generated text, for `--benchmark`."""

import sys
import time


class Watch:
    """Stopwatch that starts when it is created."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.until_first: float | None = None

    def first(self) -> None:
        """Records the time of the first piece of text. Later calls do nothing."""
        if self.until_first is None:
            self.until_first = time.perf_counter() - self.start

    def report(self, read: int, cached: int, new: int) -> None:
        """Prints a line to stderr: prompt tokens that were read and cached, and new tokens."""
        seconds = time.perf_counter() - self.start
        first = "" if self.until_first is None else f", first token after {self.until_first:.2f} s"
        reused = f" ({cached} reused from the cache)" if cached else ""
        print(
            f"{read} tokens read{reused}, {new} generated in {seconds:.2f} s{first}: "
            f"{new / seconds:.1f} tokens/s",
            file=sys.stderr,
        )
