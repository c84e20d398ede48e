"""pygpt: pretrain and finetune GPT-2-class models fast, on whatever there is. See README.md."""

__version__ = "0.1.0"

from typing import Any

from pygpt import ops
from pygpt.accelerate import accelerate
from pygpt.model import GPT, GPTConfig
from pygpt.ops.backends import backends, build_info, tune_allocator, use_backend
from pygpt.tokenizer import get_tokenizer

__all__ = [
    "GPT",
    "Classifier",
    "GPTConfig",
    "__version__",
    "accelerate",
    "backends",
    "build_info",
    "get_tokenizer",
    "ops",
    "tune_allocator",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """What is imported when it is first used, so that `import pygpt` stays light."""
    if name == "Classifier":
        from pygpt.classifier import Classifier

        return Classifier
    raise AttributeError(f"module 'pygpt' has no attribute '{name}'")
