"""Fixtures shared by the tests. The package is imported inside fixtures and tests, after the jaxtyping hook."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

import architectures


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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
def llama():
    """The tiny Llama, float32; read-only."""
    return architectures.bridge("llama")


@pytest.fixture(scope="session")
def smol():
    """SmolLM2-135M-Instruct, the default model (slow tests only); read-only."""
    import reftlens as rl

    return rl.load_model(progress=False)
