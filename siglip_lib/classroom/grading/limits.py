"""What an answer may take of the machine."""

import math
import resource
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of one answer and its check: seconds of a core, and GiB of memory beside what Python and torch take."""

    seconds: float = 60
    gib: float = 4

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and self.gib > 0):
            raise ValueError(f"seconds={self.seconds} and gib={self.gib} must be positive")

    @property
    def by_the_clock(self) -> float:
        """Seconds after which an answer ends that only waits; on a busy machine one that computes gets its share."""
        return 4 * self.seconds

    def impose(self) -> None:
        """Limit this process for good: its memory, its time on a core, and the size of a file that it writes."""
        taken = _bytes_of_addresses()
        _lower(resource.RLIMIT_AS, taken + int(self.gib * 2**30))
        seconds = math.ceil(self.seconds)
        _lower(
            resource.RLIMIT_CPU, seconds, seconds + 1
        )  # a signal that tells why, then one that none survives
        _lower(resource.RLIMIT_FSIZE, 2**27)
        _lower(resource.RLIMIT_CORE, 0)


def _bytes_of_addresses() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _lower(kind: int, soft: int, hard: int | None = None) -> None:
    """Set a limit, unless a lower one holds already."""
    hard, before = soft if hard is None else hard, resource.getrlimit(kind)[1]
    if before != resource.RLIM_INFINITY:
        soft, hard = min(soft, before), min(hard, before)
    resource.setrlimit(kind, (soft, hard))
