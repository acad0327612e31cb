"""Settings of every test: CPU, eight virtual devices, quick compiling, strict ranks.

NPROC: eight virtual devices on two cores deadlock in a collective when XLA's thread
pools are sized by the real core count; it must be set before jax is imported.
"""

import collections
import gc
import os
import pathlib

import quick

os.environ["NPROC"] = "16"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = quick.xla_flags(devices=8)
CACHE = pathlib.Path(__file__).parent.parent / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

quick.collect_seldom()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = pathlib.Path(__file__).parent.parent.parent / "shared"


# The files that take longest (20 s and more) come first, or one process would be busy
# with the last of them when the other has nothing to do. Those whose hosts wait for
# each other take turns with those that compile.
LONG = (
    "hosts/kills_test.py",
    "models/transformer_xl_test.py",
    "hosts/multihost_test.py",
    "models/all_models_test.py",
    "hosts/multihost_faults_test.py",
    "models/performer_test.py",
    "launch/local_processes_test.py",
    "models/universal_test.py",
    "training/train_test.py",
    "security_test.py",
)


def pytest_collection_modifyitems(items):
    """LONG, then the files of most tests: a process asks for a file in this order."""
    tests = collections.Counter(item.path for item in items)
    here = pathlib.Path(__file__).parent
    rank = {here / name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda x: (rank.get(x.path, len(LONG)), -tests[x.path]))


@pytest.fixture(autouse=True)
def data_directory(tmp_path_factory, monkeypatch):
    """Prepared corpora of tests never land in the user's cache."""
    root = tmp_path_factory.getbasetemp() / "prepared"
    monkeypatch.setenv("XLFORMER_DATA", str(root))
    return root


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Where trained_run keeps its run, which all tests of a process share."""
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def complaints_stay_here():
    """Orbax abandons coroutines when one of several reads fails; each then complains.

    For tests that ignore PytestUnraisableExceptionWarning: what they left is collected
    before the next test.
    """
    gc.freeze()  # or each time is 0.3 to 2 s: all that was there before
    yield
    gc.collect()
    gc.unfreeze()
