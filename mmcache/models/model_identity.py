"""What a model says it is: its class, its weights, its configuration, its adapters."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from mmcache.models.weights import weights_digest

if TYPE_CHECKING:
    from torch import nn

__all__ = ["hooked_modules", "model_identity"]

# What a configuration says that changes no activation, or is compared elsewhere: names, paths and versions, how
# outputs are wrapped, what text is made of, and the numerics.
_LEFT_OUT = {
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_experts_implementation", "_name_or_path",
    "architectures", "attn_implementation", "auto_map", "bos_token_id", "chunk_size_feed_forward",
    "decoder_start_token_id", "dtype", "eos_token_id", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "gradient_checkpointing", "id2label", "keys_to_ignore_at_inference", "label2id", "name_or_path", "num_labels",
    "output_attentions", "output_hidden_states", "output_router_logits", "prefix", "problem_type", "return_dict",
    "sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def model_identity(model: nn.Module) -> dict[str, Any]:
    """What must be the same for a resume: class, weights, computing dtype, configuration and active adapters."""
    dtype = next((weight.dtype for weight in model.parameters()), None)
    return {
        "model": type(model).__name__,
        "weights": weights_digest(model),
        "compute_dtype": str(dtype).removeprefix("torch."),
        "config": _configuration(model),
        "adapters": _adapters(model),
    }


def _configuration(model: nn.Module) -> dict[str, Any]:
    """What a model's configuration says that may change what it computes, as plain JSON; empty where it has none.

    Of transformers' it is what differs from the defaults of its class, nested ones too.
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
    # As a later read gives it: tuples are lists then, numbers that are keys are text.
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
    # A dtype or an enumeration has a name; what has only an address says another one in each process.
    text = str(said)
    return type(said).__name__ if " at 0x" in text else text


def _adapters(model: nn.Module) -> dict[str, list[str]]:
    """The adapters that take part (`active`), are switched off (`disabled`), or are in the weights (`merged`).

    As peft's layers say it, by their attributes: it need not be installed, and transformers uses the same layers.
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
    """The paths of the modules that have forward hooks, in order; the model itself is ``""``."""
    return [
        path
        for path, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks  # noqa: SLF001 -- there is no public way to see them
    ]
