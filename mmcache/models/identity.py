"""The identity of a model: digest of its weights, class, configuration and adapters."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import crc32c
import torch

from mmcache.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["hooked_modules", "model_identity", "weights_digest"]

_PIECE = 1 << 26
# Types whose repr is the same in every process, so that it may be hashed.
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of a model's parameters and buffers; blocks while it reads them all.

    Of quantised weights, the integers, scales and zero points are hashed.

    Raises:
        UnsupportedModelError: A weight that is on no device, or whose numbers cannot be read.
    """
    whole = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        for line in _lines(name, value):
            whole.update(f"{line}\n".encode())
    return whole.hexdigest()


def _lines(name: str, value: Any) -> Iterator[str]:
    """One line for each plain tensor or constant that an entry of a state dict consists of."""
    if isinstance(value, io.BytesIO):
        value = value.getvalue()
    if isinstance(value, torch.Tensor):
        yield from _tensor_lines(name, value)
    elif isinstance(value, bytes | bytearray):
        yield f"{name} bytes {len(value)} {crc32c.crc32c(value):08x}"
    elif isinstance(value, _PLAIN):
        yield f"{name} {value!r}"
    else:
        members = _members(value)
        yield f"{name} {type(value).__name__} {len(members)}"
        for key, member in members.items():
            yield from _lines(f"{name}.{key}", member)


def _members(value: Any) -> dict[Any, Any]:
    """The members of a container; none for an object of unknown type, whose repr may contain an address."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return dict(enumerate(value))
    if isinstance(value, enum.Enum):
        return {"name": value.name}
    if dataclasses.is_dataclass(value):
        return vars(value)
    if isinstance(value, torch.ScriptObject) and hasattr(value, "__getstate__"):
        return {"state": value.__getstate__()}
    return {}


def _tensor_lines(name: str, tensor: torch.Tensor) -> Iterator[str]:
    if tensor.device.type == "meta":
        raise UnsupportedModelError(f"weight {name} is on no device (meta): load the model's weights first")
    try:
        parts = _parts(tensor)
        if parts is None:
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)} {_crc(tensor):08x}"
            return
    except (NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"weight {name} is a {type(tensor).__name__} whose numbers cannot be read: {_first_line(error)}. "
            "Give the model before it was quantised, or a tensor class with __tensor_flatten__"
        ) from error
    yield f"{name} {type(tensor).__name__} {tensor.dtype} {tuple(tensor.shape)}"
    for part, value in parts.items():
        yield from _lines(f"{name}.{part}", value)


def _parts(tensor: torch.Tensor) -> dict[str, Any] | None:
    """The plain tensors and constants that a tensor consists of; None for one that is plain itself."""
    if hasattr(tensor, "__tensor_flatten__"):
        # torch.compile's protocol for tensor subclasses; those of torchao and DTensor have it.
        names, constants = tensor.__tensor_flatten__()
        return {name: getattr(tensor, name) for name in names} | {"constants": constants}
    if tensor.is_quantized:
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            scale: dict[str, Any] = {"scale": tensor.q_scale(), "zero_point": tensor.q_zero_point()}
        else:
            scale = {
                "scale": tensor.q_per_channel_scales(),
                "zero_point": tensor.q_per_channel_zero_points(),
                "axis": tensor.q_per_channel_axis(),
            }
        return {"numbers": tensor.int_repr(), **scale}
    if tensor.layout == torch.sparse_coo:
        found = tensor.coalesce()
        return {"indices": found.indices(), "values": found.values()}
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return {"rows": tensor.crow_indices(), "columns": tensor.col_indices(), "values": tensor.values()}
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return {"rows": tensor.row_indices(), "columns": tensor.ccol_indices(), "values": tensor.values()}
    return None


def _crc(tensor: torch.Tensor) -> int:
    # As a plain tensor: a subclass may refuse `view(dtype)`.
    flat = tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg().reshape(-1)
    crc = 0
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE].contiguous().cpu().view(torch.uint8)
        crc = crc32c.crc32c(piece.numpy().data, crc)
    return crc


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


# Fields of a configuration that change no activation or are compared elsewhere: names, paths, versions, the form of
# outputs, text generation, and the numerics.
_LEFT_OUT = {
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_experts_implementation", "_name_or_path",
    "architectures", "attn_implementation", "auto_map", "bos_token_id", "chunk_size_feed_forward",
    "decoder_start_token_id", "dtype", "eos_token_id", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "gradient_checkpointing", "id2label", "keys_to_ignore_at_inference", "label2id", "name_or_path", "num_labels",
    "output_attentions", "output_hidden_states", "output_router_logits", "prefix", "problem_type", "return_dict",
    "sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def model_identity(model: nn.Module) -> dict[str, Any]:
    """What must be equal for a resume: class, digest of the weights, compute dtype, configuration and adapters."""
    dtype = next((weight.dtype for weight in model.parameters()), None)
    return {
        "model": type(model).__name__,
        "weights": weights_digest(model),
        "compute_dtype": str(dtype).removeprefix("torch."),
        "config": _configuration(model),
        "adapters": _adapters(model),
    }


def _configuration(model: nn.Module) -> dict[str, Any]:
    """The fields of a model's configuration that may change what it computes, as plain JSON; empty without one.

    For transformers: the fields that differ from the defaults of the class, nested ones too.
    """
    config: Any = getattr(model, "config", None) or getattr(model, "cfg", None)
    if hasattr(config, "to_diff_dict"):
        said = config.to_diff_dict()
    elif hasattr(config, "to_dict"):
        said = config.to_dict()
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        said = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    else:
        said = config if isinstance(config, dict) else {}
    # As it will be read back: tuples become lists, and numeric keys strings.
    plain: dict[str, Any] = json.loads(json.dumps(_kept(said), sort_keys=True))
    return plain


def _kept(said: Any) -> Any:
    if isinstance(said, dict):
        return {str(name): _kept(value) for name, value in said.items() if name not in _LEFT_OUT}
    if isinstance(said, (list, tuple)):
        return [_kept(value) for value in said]
    if said is None or isinstance(said, (bool, int, str)):
        return said
    if isinstance(said, float):
        # JSON has no infinity and no NaN.
        return said if math.isfinite(said) else repr(said)
    # A dtype or an enum has a name; an address differs between processes.
    text = str(said)
    return type(said).__name__ if " at 0x" in text else text


def _adapters(model: nn.Module) -> dict[str, list[str]]:
    """The names of the adapters that are `active`, `disabled` or `merged` into the weights.

    Read from the attributes of peft's layers: peft need not be installed, and transformers uses the same layers.
    """
    found: dict[str, set[str]] = {}
    for module in model.modules():
        active = getattr(module, "active_adapters", None)
        off = getattr(module, "disable_adapters", None)
        if isinstance(off, bool) and isinstance(active, (list, tuple, str)):
            names = [active] if isinstance(active, str) else active
            found.setdefault("disabled" if off else "active", set()).update(map(str, names))
            found.setdefault("merged", set()).update(map(str, getattr(module, "merged_adapters", ())))
    return {kind: sorted(names) for kind, names in sorted(found.items()) if names}


def hooked_modules(model: nn.Module) -> list[str]:
    """Paths of the modules that have forward hooks, in order; the model itself is ``""``."""
    return [
        path
        for path, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks  # noqa: SLF001 -- there is no public way to see them
    ]
