"""Preparing a model for a job: unwrap it, eval mode, device, context length, vocabulary, errors of a forward pass."""

from __future__ import annotations

import inspect
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from mmcache.errors import ArgumentError, MmcacheError, UnsupportedModelError
from mmcache.models.tokenizer import panics_as_errors, said

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "bos_token_id",
    "context_length",
    "device_of",
    "evaluating",
    "is_compiled",
    "running",
    "text_config",
    "unsupported",
    "unwrap",
    "vocabulary",
]

_DEFAULT_CONTEXT = 1024
# Names that configurations use for the context length and the vocabulary size, the usual ones first.
_LENGTHS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length",
    "context_length", "block_size",
)  # fmt: skip
_VOCABULARIES = ("vocab_size", "n_vocab", "d_vocab")
# Values of transformers' `main_input_name` that stand for token ids.
_IDS = ("input_ids", "inputs")


def device_of(model: nn.Module) -> torch.device:
    """The device that token ids have to be on: that of the embedding if the model is spread over several."""
    # transformers raises if it finds no embedding.
    with suppress(AttributeError, NotImplementedError):
        found: torch.device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        return found
    return next((weight.device for weight in model.parameters()), torch.device("cpu"))


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's text part (the decoder in a multimodal model); None if the model has none."""
    config = getattr(model, "config", None)
    if config is None:
        return getattr(model, "cfg", None)  # TransformerLens
    find = getattr(config, "get_text_config", None)
    # It raises for a model with several text parts, such as one that speaks: then use the whole configuration.
    with suppress(ValueError, AttributeError):
        return config if find is None else find(decoder=True)
    return config


def _number(config: Any, names: Sequence[str]) -> int | None:
    """The first positive integer that a configuration has under one of these names."""
    values = (config.get(name) if isinstance(config, dict) else getattr(config, name, None) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


def _longest(model: nn.Module) -> int | None:
    """The largest number of tokens that a model takes; None if its configuration has none."""
    length = _number(text_config(model), _LENGTHS)
    for path, module in model.named_modules():
        if length is not None and "position" in path and isinstance(module, nn.Embedding):
            # As in RoBERTa: positions start after the padding row.
            reserved = module.padding_idx
            if module.num_embeddings == length and reserved is not None:
                return length - reserved - 1
    return length


def context_length(model: nn.Module, asked: int | None) -> int:
    """Tokens per context: `asked`, or by default 1,024 or the model's maximum if less. Raises ArgumentError."""
    most = _longest(model)
    if asked is None:
        return min(_DEFAULT_CONTEXT, most or _DEFAULT_CONTEXT)
    if asked < 1 or (most is not None and asked > most):
        raise ArgumentError(f"context_length is {asked}: expected 1 to {most or 'any number'}, what the model can do")
    return asked


def vocabulary(model: nn.Module) -> int | None:
    """The number of rows of the model's embedding, so ids are below it; None if unknown."""
    with suppress(AttributeError, NotImplementedError):
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        rows = embedding.num_embeddings if hasattr(embedding, "num_embeddings") else embedding.weight.shape[0]
        # A weight that is sharded over devices may show 0 rows.
        if type(rows) is int and rows > 0:
            return rows
    return _number(text_config(model), _VOCABULARIES)


def bos_token_id(model: nn.Module) -> int | None:
    """The BOS id in a model's configuration; None if it has none."""
    found = getattr(text_config(model), "bos_token_id", None)
    return found if type(found) is int and found >= 0 else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and restore the mode of each module on exit."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def unsupported(explain: Callable[[Exception], str]) -> Iterator[None]:
    """Turn any error of another library, Rust panics included, into UnsupportedModelError.

    Args:
        explain: Returns the message for an error.

    Raises:
        UnsupportedModelError: With the library's own error as its cause. Errors of mmcache and out-of-memory errors
            pass unchanged.
    """
    try:
        with panics_as_errors():
            yield
    except (MmcacheError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(explain(error)) from error


@contextmanager
def running(model: nn.Module, ids: torch.Tensor) -> Iterator[None]:
    """Turn errors of a forward pass on token ids `[batch, seq]` into UnsupportedModelError.

    Raises:
        UnsupportedModelError: The model does not take token ids, or failed on these; its own error is the cause.
            Errors of mmcache and out-of-memory errors pass unchanged.
    """
    kind = type(model).__name__
    wanted = getattr(model, "main_input_name", None)
    if wanted not in _IDS and wanted == next(iter(inspect.signature(model.forward).parameters), None):
        raise UnsupportedModelError(f"{kind} takes {wanted}, not token ids: give a language model or a text encoder")

    def explain(error: Exception) -> str:
        remedy = "give a language model or a text encoder that runs on token ids alone, or mend what it says"
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            remedy = "it is an encoder-decoder: give its encoder alone, model.get_encoder()"
        shape, low, high = list(ids.shape), ids.min(), ids.max()
        return f"{kind} failed on token ids {shape} from {low} to {high}, saying {said(error)!r}: {remedy}"

    with unsupported(explain):
        yield


# Wrappers that run one inner module unchanged, by class name, and the attribute that holds it. By name, because
# importing them would be slow, and they may not be installed.
_INNER: Final = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DistributedDataParallel": "module",
    "DeepSpeedEngine": "module",
    "Envoy": "_module",  # nnsight, whose models are Envoys
    "NNsight": "_model",  # older nnsight
}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside its wrappers, which may be nested. Module paths are relative to it.

    Known wrappers are `torch.compile`, DistributedDataParallel, DeepSpeed, peft and nnsight. Running the
    inner model skips what the wrapper itself does: compiled code, or the virtual tokens of peft's prompt
    tuning (adapters inside the layers, such as LoRA, stay in effect).

    Args:
        model: A model, wrapped or not.

    Returns:
        The innermost model: the same object, not a copy.

    Raises:
        UnsupportedModelError: The inner object is not a torch module.
    """
    inner: Any = model
    while (found := _inside(inner)) is not None:
        inner = found
    if not isinstance(inner, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__} is not a torch nn.Module: pass the model itself")
    return inner


def is_compiled(model: Any) -> bool:
    """Whether the model or any of its modules is compiled with `torch.compile`."""
    return isinstance(model, nn.Module) and any(
        "_orig_mod" in module._modules or module._compiled_call_impl is not None  # noqa: SLF001 - no public way
        for module in model.modules()
    )


def _inside(model: Any) -> Any:
    """The model inside a wrapper; None if `model` is no known wrapper."""
    names = [kind.__name__ for kind in type(model).__mro__]
    if "PeftModel" in names:
        return model.get_base_model()
    return next((getattr(model, _INNER[name]) for name in _INNER if name in names), None)
