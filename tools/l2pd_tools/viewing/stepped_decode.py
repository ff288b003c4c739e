"""A decode that takes each step on demand, for live viewers."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

from l2pd_adapters.huggingface.settings import StepObserver
from l2pd_plugins.denoising import StepOutcome
from l2pd_plugins.recording import Frame, FrameReader
from l2pd_tools.evaluation.results import Evaluation
from l2pd_tools.evaluation.run import evaluate


class SteppedDecode:
    """Runs `evaluate` in a separate thread, one step for each frame that the caller requests.

    Iterate over it to get the frames; afterwards `result` has the return value of `evaluate`. Close
    a decode that is abandoned, for example with ``contextlib.closing(...)``.

    Args:
        arguments: those of `evaluate` except `observers`; max_new_tokens is required.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.result: Evaluation | None = None
        self.waited = 0.0
        """Seconds in which the decode waited for the caller; the result's seconds include them."""
        self._size = settings["max_new_tokens"]
        self._error: Exception | None = None
        self._closed = False
        self._asked = threading.Semaphore(0)
        self._shown: queue.SimpleQueue[tuple[int, Frame] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._decode, args=(arguments, settings), name="l2pd decode", daemon=True
        )

    def __iter__(self) -> Iterator[tuple[int, Frame]]:
        """Each frame with the index of its prompt; a frame is computed when it is requested.

        Raises whatever the decode raises. Can be iterated only once.
        """
        self._thread.start()
        while True:
            self._asked.release()
            shown = self._shown.get()
            if shown is None:
                break
            yield shown
        self._thread.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the decode at its next step, and wait until it has ended."""
        self._closed = True
        self._asked.release()
        if self._thread.ident is not None:
            self._thread.join()

    def _decode(self, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        try:
            self._wait()
            self.result = evaluate(*arguments, **settings, observers=self._observer)
        except _Closed:
            pass
        except Exception as error:  # noqa: BLE001  (the watcher raises it in its own thread)
            self._error = error
        finally:
            self._shown.put(None)

    def _observer(self, rows: list[int]) -> StepObserver:
        reader = FrameReader(self._size)

        def on_step(sequences: list[int], blocks: list[int], outcome: StepOutcome) -> None:
            for sequence, frame in reader.read(sequences, blocks, outcome):
                self._shown.put((rows[sequence], frame))
                began = time.perf_counter()
                self._wait()
                self.waited += time.perf_counter() - began

        return on_step

    def _wait(self) -> None:
        self._asked.acquire()
        if self._closed:
            raise _Closed


class _Closed(Exception):
    """The caller has closed the decode."""
