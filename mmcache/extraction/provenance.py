"""Provenance of activations: identity, which must be equal to resume, numerics, which may differ, and a record.

*Identity* (weights, configuration, adapters, tokenizer, corpus, sites, geometry): any difference is refused. *Numerics*
(what may change the last bits: batch size, attention, device, threads, TF32, autocast, versions, and the digest of the
output on a fixed context): refused unless accepted, and then recorded. *Record* (command, paths, times): never
compared. Between identity and numerics is the fingerprint (`fingerprint.py`), which is compared with a tolerance.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import warnings
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from mmcache.errors import PlanMismatchError
from mmcache.format.manifest import is_store, read_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from mmcache.format.manifest import Manifest
    from mmcache.models.sites import ResolvedSite
    from mmcache.system.launcher import Rank

__all__ = ["compare", "model_record", "numerics", "plan_threads", "recorded", "site_modules"]


def site_modules(sites: tuple[ResolvedSite, ...]) -> dict[str, list[str]]:
    """The modules of each site, one per layer, as module paths with `:in` or `:out`."""
    return {site.name: [f"{module}:{site.side}" for module in site.modules] for site in sites}


def model_record(model: nn.Module) -> dict[str, Any]:
    """The record of a model: its name and revision, versions of mmcache and Python, and the time."""
    config = getattr(model, "config", None)
    return {
        "name": getattr(config, "_name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
        "mmcache": version("mmcache"),
        "python": platform.python_version(),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def numerics(model: nn.Module, device: torch.device, batch_size: int, activations: str | None) -> dict[str, Any]:
    """The settings that may change the last bits of an activation.

    Args:
        model: the model.
        device: where it runs.
        batch_size: contexts per forward pass.
        activations: the exact digest of the output on the fixed context; None if the model is not deterministic.
    """
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
        **_switches(device),
        "activations": activations,
    }


def _switches(device: torch.device) -> dict[str, Any]:
    """Process-wide settings: autocast, precision of float32 products, deterministic algorithms, CUDA versions."""
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    cuda = device.type == "cuda"
    return {
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
        "float32_matmul_precision": _precision(),
        "tf32": _tf32() if cuda else None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,  # type: ignore[no-untyped-call]
    }


def _precision() -> str:
    """The precision of float32 products: torch's older setting, or the newer ones once those were used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.get_float32_matmul_precision()
        except RuntimeError:
            # torch refuses to read the older setting if the newer ones differ by device.
            backends = {"cuda": torch.backends.cuda, "mkldnn": torch.backends.mkldnn}
            return ", ".join(f"{name} {backend.matmul.fp32_precision}" for name, backend in backends.items())


def _tf32() -> list[Any]:
    """Whether products and convolutions on CUDA use TF32."""
    backends = torch.backends
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return [backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32]
        except RuntimeError:
            return [kind.fp32_precision == "tf32" for kind in (backends.cuda.matmul, backends.cudnn.conv)]  # type: ignore[attr-defined]


def _processor(device: torch.device) -> str | None:
    if device.type == "cpu":
        return torch.backends.cpu.get_cpu_capability()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def compare(where: Path | str, kind: str, stored: dict[str, Any], asked: dict[str, Any], remedy: str) -> None:
    """Compare the settings of a store with those of a job; nested dicts are compared field by field.

    Raises:
        PlanMismatchError: with a table of the fields that differ.
    """
    stored, asked = _flat(stored), _flat(asked)
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


def _flat(settings: dict[str, Any], before: str = "") -> dict[str, Any]:
    """The fields of nested dicts, flattened to names like `config.rope_parameters.factor`."""
    fields: dict[str, Any] = {}
    for name, value in settings.items():
        fields |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return fields


def recorded(stored: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """The fields of `asked` that are in `stored`: older stores recorded fewer, so the others cannot be compared."""
    return {name: value for name, value in asked.items() if name in stored}


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}…{text[-16:]}"


_LIMIT = "OMP_NUM_THREADS"


def plan_threads(path: Path, rank: Rank, planned: Manifest | None = None) -> None:
    """Set torch's number of threads to the plan's, or, without a plan and under a launcher, to torch's default.

    `planned` is a plan that is stored elsewhere.

    torchrun sets OMP_NUM_THREADS to 1 if the user has not set it; then the last bits would differ from those of a
    single process.
    """
    if planned is None and is_store(path):
        planned = read_manifest(path)
    if planned is not None:
        threads = planned.source.get("numerics", {}).get("threads")
        if isinstance(threads, int) and threads > 0:
            torch.set_num_threads(threads)
    elif rank.launcher is not None and os.environ.get(_LIMIT) == "1":
        torch.set_num_threads(_usual_threads())


def _usual_threads() -> int:
    """The default number of threads, from a process without OMP_NUM_THREADS: torch reads it only at startup."""
    free = {name: value for name, value in os.environ.items() if name != _LIMIT}
    code = "import torch; print(torch.get_num_threads())"
    told = subprocess.run([sys.executable, "-c", code], env=free, capture_output=True, text=True, check=True)  # noqa: S603 -- our own
    return int(told.stdout)
