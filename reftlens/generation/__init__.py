"""Text written under an edit."""

from reftlens.generation.prefilled import Prefilled, prefill
from reftlens.generation.result import Generation
from reftlens.generation.session import Decoding
from reftlens.generation.writing import generate, stream

__all__ = ["Decoding", "Generation", "Prefilled", "generate", "prefill", "stream"]
