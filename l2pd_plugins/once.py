"""What is said once in a process: a warning, or a failure."""

from __future__ import annotations

import threading


class Once:
    """Tells whether a key is new: ``if once(key): logger.warning(...)``.

    At most `most` keys are remembered, and no other key is new after that. Keys may depend on
    requests, so this bounds the memory and the log.
    """

    def __init__(self, most: int = 1000) -> None:
        self.most = most
        self.seen: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, key: str) -> bool:
        with self._lock:
            if key in self.seen or len(self.seen) >= self.most:
                return False
            self.seen.add(key)
            return True
