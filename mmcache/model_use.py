"""A model as a job uses it: in eval mode, on its device, in contexts that it can take."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch

from mmcache.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["context_length", "device_of", "evaluating"]

_DEFAULT_CONTEXT = 1024


def device_of(model: nn.Module) -> torch.device:
    """Give the device that ids have to be on: that of the embedding, where a model is on several."""
    # transformers raises where it cannot tell.
    with suppress(AttributeError, NotImplementedError):
        found: torch.device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        return found
    return next((weight.device for weight in model.parameters()), torch.device("cpu"))


def context_length(model: nn.Module, asked: int | None) -> int:
    """Give the tokens of a context: as asked, or 1,024, or what the model can do. Raises ArgumentError."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if asked is None:
        return min(_DEFAULT_CONTEXT, most or _DEFAULT_CONTEXT)
    if asked < 1 or (most is not None and asked > most):
        raise ArgumentError(f"context_length is {asked}: expected 1 to {most or 'any number'}, what the model can do")
    return asked


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and every module of it back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
