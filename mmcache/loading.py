"""Models and tokenizers by name: a folder, a name on the Hugging Face hub, or `demo`, the one in this package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from mmcache.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DEMO", "load_model", "load_tokenizer"]

DEMO = Path(__file__).parent / "demo"


def _place(name: str) -> str:
    return str(DEMO) if name == "demo" and not Path(name).exists() else name


def _transformers() -> Any:
    try:
        import transformers  # noqa: PLC0415 -- an extra, and slow to import
    except ImportError as error:
        raise UnsupportedModelError("loading models needs transformers: pip install 'mmcache[extract]'") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_model(name: str, compute_dtype: str | None) -> nn.Module:
    """Load a model, in eval mode, on the CPU.

    Args:
        name: a folder, a name on the hub, or `demo` where no folder is called that.
        compute_dtype: what it computes in, by name; None for its checkpoint's own.

    Raises:
        UnsupportedModelError: there is no such model, or transformers cannot load it.
    """
    transformers = _transformers()
    place = _place(name)
    dtype = "auto" if compute_dtype is None else getattr(torch, compute_dtype)
    try:
        config = transformers.AutoConfig.from_pretrained(place)
        causal = any("LMHead" in kind or "CausalLM" in kind for kind in config.architectures or [])
        loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        model = loader.from_pretrained(place, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(f"{name} cannot be loaded as a model: {error}") from error
    return cast("nn.Module", model.eval())


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model.

    Raises:
        UnsupportedModelError: there is none.
    """
    try:
        return _transformers().AutoTokenizer.from_pretrained(_place(name))
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(f"{name} has no tokenizer that can be loaded: {error}") from error
