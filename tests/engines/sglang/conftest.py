import pytest
from sglang.srt.plugins import load_plugins

from tests.engines.checkpoints import random_sdar


@pytest.fixture(scope="session", autouse=True)
def plugins():
    """SGLang's loader, as each of its processes calls it."""
    load_plugins()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a small SDAR with random weights."""
    return random_sdar(tmp_path_factory.mktemp("sdar"))
