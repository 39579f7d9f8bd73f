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


def is_spread(model: nn.Module) -> bool:
    """Tell whether a model was put on its devices by transformers, in parts, and so must not be moved."""
    return getattr(model, "hf_device_map", None) is not None


def load_model(name: str, compute_dtype: str | None, *, device_map: str | dict[str, Any] | None = None) -> nn.Module:
    """Load a model, in eval mode, on the CPU, or where `device_map` says.

    Args:
        name: a folder, a name on the hub, or `demo` where no folder is called that.
        compute_dtype: what it computes in, by name; None for its checkpoint's own.
        device_map: as transformers has it, such as `"auto"`: the layers of a model that is too wide for one GPU are
            put on several, one after the other. It needs accelerate.

    Raises:
        UnsupportedModelError: there is no such model, or transformers cannot load it, or not all of it fits on the
            devices.
    """
    transformers = _transformers()
    place = _place(name)
    dtype = "auto" if compute_dtype is None else getattr(torch, compute_dtype)
    try:
        config = transformers.AutoConfig.from_pretrained(place)
        causal = any("LMHead" in kind or "CausalLM" in kind for kind in config.architectures or [])
        loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        options = {} if device_map is None else {"device_map": device_map}
        model = loader.from_pretrained(place, dtype=dtype, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UnsupportedModelError(f"{name} cannot be loaded as a model: {error}") from error
    away = [path for path, weight in model.named_parameters() if weight.device.type == "meta"]
    if away:
        # Such weights come and go with each pass: nobody could say which they were, and nothing would be fast.
        raise UnsupportedModelError(
            f"{name} does not fit: device_map={device_map!r} leaves {len(away)} of its weights on no device, the first "
            f"of them {away[0]}. Give more or larger GPUs, or a --compute-dtype that takes less"
        )
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
