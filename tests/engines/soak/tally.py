"""What a soak counts, and the memory of the server."""

import statistics
import time
from collections import Counter
from dataclasses import dataclass, field

import psutil

COUNTED = ("asked", "right", "wrong", "lost", "cancelled", "refused", "5xx")


@dataclass
class Tally:
    """Of one run."""

    counts: Counter = field(default_factory=lambda: Counter(dict.fromkeys(COUNTED, 0)))
    right_of: Counter = field(default_factory=Counter)
    """Right answers by the policy that was asked for."""
    memory: list = field(default_factory=list)
    """MiB of resident memory of all processes, one value for each sample."""
    live: list = field(default_factory=list)
    """MiB that the process with the model has allocated and not freed."""
    began: float = field(default_factory=time.monotonic)

    def with_faults_only(self):
        """A new one that begins now, and in which earlier faults are still counted."""
        begun = Tally()
        for name in ("wrong", "lost", "5xx"):
            begun.counts[name] = self.counts[name]
            begun.counts["asked"] += self.counts[name]
        return begun

    def line(self):
        """The counts so far."""
        minutes = (time.monotonic() - self.began) / 60
        said = " ".join(f"{name}={self.counts[name]}" for name in COUNTED)
        return (
            f"{minutes:6.1f} min  {said}  memory={self.memory[-1]:.0f} MiB live={self.live[-1]:.0f}"
        )

    def sample(self, server):
        """Note the memory of a server."""
        self.memory.append(resident(server.process.pid))
        self.live.append(server.live_mib)


def growth(values):
    """Of samples in MiB, the value after the first third, at the end, and the difference; each the
    median of a tenth of them."""
    values = [mib for mib in values if mib == mib]  # while the file is written it is empty
    width = max(1, len(values) // 10)
    third = len(values) // 3
    before = statistics.median(values[third : third + width])
    after = statistics.median(values[-width:])
    return {"after_a_third": round(before), "end": round(after), "grown": round(after - before)}


def resident(pid):
    """MiB of resident memory of a process and of all that descend from it."""
    process = psutil.Process(pid)
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20
