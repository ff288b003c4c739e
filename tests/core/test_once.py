"""What is said once."""

from __future__ import annotations

import sys
import threading

from l2pd_plugins.once import Once


def test_a_key_is_new_once_and_the_number_of_keys_is_bounded():
    once = Once(2)
    assert [once(key) for key in "aabacbd"] == [True, False, True, *[False] * 4]
    assert once.seen == {"a", "b"}
    assert Once(2)("a"), "each object remembers its own keys"
    assert not Once(0)("a")


def test_threads_that_ask_at_the_same_time_get_one_yes():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        once, found, start = Once(), [], threading.Barrier(8)

        def ask() -> None:
            start.wait(timeout=10)
            found.extend(once(str(number)) for number in range(200))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert len(found) == 1600
    assert sum(found) == 200
