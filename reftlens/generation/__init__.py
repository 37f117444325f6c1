"""Text written under an edit."""

from reftlens.generation.decoding import Decoding
from reftlens.generation.prompt_cache import PromptCache, prefill
from reftlens.generation.result import Generation
from reftlens.generation.writing import generate, stream

__all__ = ["Decoding", "Generation", "PromptCache", "generate", "prefill", "stream"]
