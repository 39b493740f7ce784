"""What an answer may take of the machine."""

import resource
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of one answer and its check: seconds by the clock, and GiB of memory beside what Python and torch take."""

    seconds: float = 60
    gib: float = 4

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and self.gib > 0):
            raise ValueError(f"seconds={self.seconds} and gib={self.gib} must be positive")

    def impose(self) -> None:
        """Limit this process for good: its memory, its time on a core, and the size of a file that it writes."""
        taken = _bytes_of_addresses()
        _lower(resource.RLIMIT_AS, taken + int(self.gib * 2**30))
        _lower(resource.RLIMIT_CPU, int(self.seconds) + 1)  # if nobody is left to look at the clock
        _lower(resource.RLIMIT_FSIZE, 2**27)
        _lower(resource.RLIMIT_CORE, 0)


def _bytes_of_addresses() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _lower(kind: int, most: int) -> None:
    """Set a limit, unless a lower one holds already."""
    before = resource.getrlimit(kind)[1]
    most = most if before == resource.RLIM_INFINITY else min(most, before)
    resource.setrlimit(kind, (most, most))
