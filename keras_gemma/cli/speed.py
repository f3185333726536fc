"""How fast a text came, for `--benchmark`."""

import sys
import time


class Watch:
    """Started when it is made; `first` is to be called at the first piece of a text."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.until_first: float | None = None

    def first(self) -> None:
        """Note the time of the first piece; later calls do nothing."""
        if self.until_first is None:
            self.until_first = time.perf_counter() - self.start

    def report(self, read: int, cached: int, new: int) -> None:
        """One line on standard error: tokens read, taken from the cache, and made."""
        seconds = time.perf_counter() - self.start
        first = "" if self.until_first is None else f", the first after {self.until_first:.2f} s"
        held = f" ({cached} more were in the cache)" if cached else ""
        print(
            f"{read} tokens read{held}, {new} made in {seconds:.2f} s{first}: "
            f"{new / seconds:.1f} tokens/s",
            file=sys.stderr,
        )
