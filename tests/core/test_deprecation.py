"""A deprecated name works as before and warns once, naming the line that must be changed."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass

import pytest

from l2pd_plugins import deprecation
from l2pd_plugins.deprecation import L2PDDeprecationWarning, deprecated, warn_deprecated
from l2pd_plugins.once import Once

MESSAGE = (
    "sample.old_name is deprecated since version 0.2 and will be removed in 0.4; "
    "use sample.new_name"
)
SAMPLE = {"since": "0.2", "removed_in": "0.4", "instead": "sample.new_name"}


@pytest.fixture(autouse=True)
def nothing_warned_yet(monkeypatch):
    monkeypatch.setattr(deprecation, "_first", Once())


def recorded(call, times=1):
    """The (results, warnings) of `times` calls; Python's own filter lets every warning through."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        return [call() for _ in range(times)], found


def new_name(value: int, *, scale: int = 1) -> int:
    """Scale a value."""
    return value * scale


old_name = deprecated("sample.old_name", **SAMPLE)(new_name)


@deprecated("sample.old_name", **SAMPLE)
@dataclass
class OldClass:
    value: int = 3


class Child(OldClass):
    pass


def test_a_function_works_as_before_and_warns_once():
    results, (warning,) = recorded(lambda: old_name(3, scale=2), times=3)
    assert results == [6, 6, 6]
    assert str(warning.message) == MESSAGE
    assert warning.category is L2PDDeprecationWarning


def test_a_function_keeps_its_name_signature_and_docstring():
    assert old_name.__name__ == "new_name"
    assert old_name.__doc__ == "Scale a value."
    assert inspect.signature(old_name) == inspect.signature(new_name)


def test_the_warning_names_the_line_of_the_caller():
    def call():
        return old_name(1)

    def create():
        return OldClass()

    def read():
        def old_option():
            warn_deprecated("old_option", **SAMPLE)

        old_option()  # this line

    lines, first = inspect.getsourcelines(read)
    (own,) = [first + i for i, line in enumerate(lines) if "# this line" in line]
    for user, line in (
        (call, call.__code__.co_firstlineno + 1),
        (create, create.__code__.co_firstlineno + 1),
        (read, own),
    ):
        deprecation._first.seen.clear()
        _, (warning,) = recorded(user)
        assert (warning.filename, warning.lineno) == (__file__, line), user


def test_a_class_stays_a_class_and_warns_once_when_it_is_created():
    assert inspect.isclass(OldClass)
    results, found = recorded(lambda: OldClass(5), times=2)
    assert [r.value for r in results] == [5, 5]
    assert isinstance(results[0], OldClass)
    assert [str(w.message) for w in found] == [MESSAGE]


def test_a_subclass_of_a_deprecated_class_warns_too():
    (child,), found = recorded(Child)
    assert child.value == 3
    assert [str(w.message) for w in found] == [MESSAGE]


class TextWithoutInit(str):
    pass


class NewWithoutInit:
    def __new__(cls, value):
        self = super().__new__(cls)
        self.value = value
        return self


class Plain:
    pass


@pytest.mark.parametrize(
    ("base", "arguments"), [(TextWithoutInit, ("a",)), (NewWithoutInit, (3,)), (Plain, ())]
)
def test_a_class_without_an_init_takes_the_arguments_that_it_took(base, arguments):
    old = deprecated("sample.old_name", **SAMPLE)(type("Old", (base,), {}))
    (made,), found = recorded(lambda: old(*arguments))
    assert vars(made) == vars(base(*arguments))
    assert str.__eq__(made, "a") if base is TextWithoutInit else isinstance(made, base)
    assert [str(w.message) for w in found] == [MESSAGE]
    with pytest.raises(TypeError):
        old(*arguments, 1, 2, 3)


def test_declaring_a_deprecated_name_does_not_warn():
    def declare():
        deprecated("sample.old_name", **SAMPLE)(new_name)
        deprecated("sample.old_name", **SAMPLE)(type("Old", (), {}))

    assert recorded(declare)[1] == []


def test_each_name_warns_separately():
    other = deprecated("sample.other", **SAMPLE)(new_name)
    _, found = recorded(lambda: (old_name(1), other(1)), times=2)
    assert [str(w.message).split()[0] for w in found] == ["sample.old_name", "sample.other"]


def test_threads_together_warn_once():
    gate = threading.Barrier(8)

    def call():
        gate.wait()
        old_name(1)

    def all_at_once():
        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert len(recorded(all_at_once)[1]) == 1


def test_errors_of_the_deprecated_function_are_passed_through():
    with pytest.warns(L2PDDeprecationWarning), pytest.raises(TypeError, match="scale"):
        old_name(1, scales=2)


@pytest.mark.parametrize("thing", [3, "name", None])
def test_only_callables_can_be_decorated(thing):
    with pytest.raises(TypeError, match=r"deprecated 'x': .*; expected a function or a class"):
        deprecated("x", **SAMPLE)(thing)


def test_python_shows_it_by_default_from_a_module_that_is_not_main(tmp_path):
    (tmp_path / "library.py").write_text(
        "from l2pd_plugins.deprecation import warn_deprecated\n"
        "def old():\n"
        "    warn_deprecated('old', since='1', removed_in='2', instead='new')\n"
        "def use():\n"
        "    old()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import library; library.use()"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        check=True,
    )
    assert "library.py:5: L2PDDeprecationWarning: old is deprecated" in done.stderr
