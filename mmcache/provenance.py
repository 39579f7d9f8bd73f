"""Where activations come from: what must be the same for a resume, what may differ if told so, what is only kept.

*Identity* (weights, tokenizer, corpus, sites, geometry): any difference is refused. *Numerics* (what may change
the last bits: batch size, attention, device, threads, versions): refused unless accepted, and then recorded.
*Record* (command, paths, times): never compared.
"""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from mmcache.errors import PlanMismatchError
from mmcache.tokenizer_file import tokenizer_digest, tokenizer_text
from mmcache.weights import weights_digest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from mmcache.sites import ResolvedSite

__all__ = [
    "compare",
    "model_identity",
    "model_record",
    "numerics",
    "site_modules",
    "tokenizer_identity",
]


def tokenizer_identity(tokenizer: Any, special: Sequence[int]) -> str:
    """Hash of what a tokenizer does: its own JSON where it has one, its vocabulary otherwise; and the special ids."""
    text = tokenizer_text(tokenizer) or json.dumps(sorted(tokenizer.get_vocab().items()))
    return tokenizer_digest(text, special)


def model_identity(model: nn.Module) -> dict[str, Any]:
    """Say which model this is: its class and the hash of its weights, and the dtype that it computes in."""
    dtype = next((weight.dtype for weight in model.parameters()), None)
    return {
        "model": type(model).__name__,
        "weights": weights_digest(model),
        "compute_dtype": str(dtype).removeprefix("torch."),
    }


def site_modules(sites: tuple[ResolvedSite, ...]) -> dict[str, list[str]]:
    """Say which modules the sites are, layer by layer, in the notation of module paths."""
    return {site.name: [f"{module}:{site.side}" for module in site.modules] for site in sites}


def model_record(model: nn.Module) -> dict[str, Any]:
    """Say what is worth keeping of where a model came from: its name, its revision, its class."""
    config = getattr(model, "config", None)
    return {
        "name": getattr(config, "_name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
        "mmcache": version("mmcache"),
        "python": platform.python_version(),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def numerics(model: nn.Module, device: torch.device, batch_size: int) -> dict[str, Any]:
    """Say what may change the last bits of an activation."""
    config = getattr(model, "config", None)
    transformers = sys.modules.get("transformers")
    on_cpu = device.type == "cpu"
    return {
        "batch_size": batch_size,
        "attention": getattr(config, "_attn_implementation", None),
        "device": device.type,
        "processor": _processor(device),
        "threads": torch.get_num_threads() if on_cpu else None,
        "torch": torch.__version__,
        "transformers": getattr(transformers, "__version__", None),
        "machine": platform.machine(),
    }


def _processor(device: torch.device) -> str | None:
    if device.type == "cpu":
        return torch.backends.cpu.get_cpu_capability()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def compare(where: Path, kind: str, stored: dict[str, Any], asked: dict[str, Any], remedy: str) -> None:
    """Compare the settings of a store with those of a resume.

    Raises:
        PlanMismatchError: a table of the fields that differ.
    """
    fields = [name for name in {**stored, **asked} if stored.get(name) != asked.get(name)]
    if fields:
        width = max(map(len, fields))
        lines = [
            f"  {name:{width}}  {_short(stored.get(name))} in the store, {_short(asked.get(name))} now"
            for name in fields
        ]
        raise PlanMismatchError(
            f"{where} was planned with another {kind}, and holds what that made:\n" + "\n".join(lines) + f"\n{remedy}"
        )


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}…{text[-16:]}"
