"""The model inside what torch, peft and nnsight wrap around it."""

from __future__ import annotations

from typing import Any, Final

from torch import nn

from mmcache.errors import UnsupportedModelError

__all__ = ["is_compiled", "unwrap"]

# Wrappers that run one inner module unchanged, by class name, and the attribute that holds it. By name,
# because importing any of them only to ask would be slow, or they are not installed.
_INNER: Final = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DistributedDataParallel": "module",
    "DeepSpeedEngine": "module",
    "Envoy": "_module",  # nnsight, whose models are Envoys
    "NNsight": "_model",  # nnsight before they were
}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside its wrappers, which may be nested: module paths are relative to what this returns.

    Known wrappers are `torch.compile`, DistributedDataParallel, DeepSpeed, peft and nnsight. Running the
    inner model leaves out what a wrapper does by itself: compiled code, or the virtual tokens of peft's
    prompt tuning (adapters that live in the layers, such as LoRA, stay in effect).

    Args:
        model: A model, wrapped or not.

    Returns:
        The innermost model: the same object, not a copy.

    Raises:
        UnsupportedModelError: What is inside is not a torch module.
    """
    inner: Any = model
    while (found := _inside(inner)) is not None:
        inner = found
    if not isinstance(inner, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__} is not a torch nn.Module: pass the model itself")
    return inner


def is_compiled(model: Any) -> bool:
    """Whether `torch.compile` has been put around or inside a model, or around any of its modules."""
    return isinstance(model, nn.Module) and any(
        "_orig_mod" in module._modules or module._compiled_call_impl is not None  # noqa: SLF001 - no public way
        for module in model.modules()
    )


def _inside(model: Any) -> Any:
    """What a wrapper wraps, or None where `model` is no known wrapper."""
    names = [kind.__name__ for kind in type(model).__mro__]
    if "PeftModel" in names:
        return model.get_base_model()
    return next((getattr(model, _INNER[name]) for name in _INNER if name in names), None)
