"""Where activations come from: what must be the same for a resume, what may differ if told so, what is only kept.

*Identity* (weights, configuration, adapters, tokenizer, corpus, sites, geometry): any difference is refused. *Numerics*
(what may change the last bits: batch size, attention, device, threads, TF32, autocast, versions, and the digest of what
a fixed context gave): refused unless accepted, and then recorded. *Record* (command, paths, times): never compared.
Between the two is the fingerprint (`fingerprint.py`), which is compared with a tolerance.
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


def numerics(model: nn.Module, device: torch.device, batch_size: int, activations: str | None) -> dict[str, Any]:
    """What may change the last bits of an activation.

    Args:
        model: the model.
        device: where it runs.
        batch_size: contexts a forward pass.
        activations: the exact digest of what a fixed context gave; None where the model gives something else each time.
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
    """What is set for the whole process: autocast, how products of float32 are rounded, deterministic algorithms."""
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
    """How products of float32 are rounded, by torch's older setting, or by the newer ones once those were used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.get_float32_matmul_precision()
        except RuntimeError:
            # torch refuses to say it by the older setting where the newer ones differ by device.
            backends = {"cuda": torch.backends.cuda, "mkldnn": torch.backends.mkldnn}
            return ", ".join(f"{name} {backend.matmul.fp32_precision}" for name, backend in backends.items())


def _tf32() -> list[Any]:
    """Whether products and convolutions on CUDA round float32 to TF32."""
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
    """Compare the settings of a store with those of a resume; tables in them are compared field by field.

    Raises:
        PlanMismatchError: a table of the fields that differ.
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
    """The fields of nested tables side by side, as `config.rope_parameters.factor`."""
    fields: dict[str, Any] = {}
    for name, value in settings.items():
        fields |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return fields


def recorded(stored: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Of some settings, those that a store has: older ones recorded fewer, which says nothing about what they were."""
    return {name: value for name, value in asked.items() if name in stored}


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}…{text[-16:]}"


_LIMIT = "OMP_NUM_THREADS"


def plan_threads(path: Path, rank: Rank, planned: Manifest | None = None) -> None:
    """Compute with as many threads as the plan at `path` says, or, where there is none, as one process would take.

    `planned` is a plan that is somewhere else.

    torchrun gives each of its processes one thread where the user has not said another number: then a job would not be
    the same, to the last bit, as that of one process.
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
    """Ask a process for which nobody has set a number; torch reads it once, when it starts."""
    free = {name: value for name, value in os.environ.items() if name != _LIMIT}
    code = "import torch; print(torch.get_num_threads())"
    told = subprocess.run([sys.executable, "-c", code], env=free, capture_output=True, text=True, check=True)  # noqa: S603 -- our own
    return int(told.stdout)
