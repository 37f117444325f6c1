"""Fixtures shared by the tests. The package is imported inside fixtures and tests, after the jaxtyping hook."""

import gc
import os
import sys
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

import architectures

CORES = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
if "PYTEST_XDIST_WORKER" in os.environ:  # for child processes; more threads than cores only wait
    os.environ["OMP_NUM_THREADS"] = str(CORES)  # and not what the process that starts the workers was given
torch.set_num_threads(1)  # on tiny models a second thread only waits, and on a busy machine it waits long


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups; 3.8 cannot with pytest 9.2
def pytest_collection_modifyitems(items):
    """Tests of a file follow one another on one worker, as they share what the first of them computed."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish():
    """What is imported stays: full collections, of which a run of an experiment makes some, need not look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.default_generator.manual_seed(0)  # `torch.manual_seed` notes its stack for each kind of device not in use
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(autouse=True)
def _forgetful() -> None:
    """No test reads what another one computed."""
    if memory := sys.modules.get("reftlens.cone.memory"):
        memory.forget()


@pytest.fixture(params=architectures.ARCHITECTURES)
def any_model(request):
    """Each tiny architecture in turn, float32; read-only."""
    return architectures.bridge(request.param)


@pytest.fixture
def gpt2():
    """The tiny GPT-2, float32; read-only."""
    return architectures.bridge("gpt2")


@pytest.fixture
def gpt2_double():
    """The tiny GPT-2 in float64; read-only."""
    return architectures.bridge("gpt2", torch.float64)


@pytest.fixture
def doubles(monkeypatch):
    """Norms, rotary angles and softmax in float64, too: llama-like models compute them in float32 otherwise."""
    from reftlens.bridge.fingerprint import _directions

    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    _directions.cache_clear()
    yield
    _directions.cache_clear()  # no other test gets those of this dtype


@pytest.fixture
def llama():
    """The tiny Llama, float32; read-only."""
    return architectures.bridge("llama")


@pytest.fixture
def smol():
    """SmolLM2-135M-Instruct, the default model (slow tests only), on this worker's share of the cores; read-only."""
    torch.set_num_threads(CORES)
    yield _smol()
    torch.set_num_threads(1)


@cache
def _smol():
    import reftlens as rl

    return rl.load_model(progress=False)
