"""Fingerprint of a model: a sketch of its activations on a fixed short context, equal up to rounding on any hardware.

Weights alone do not identify a model: a changed `rope_theta`, a hook, an adapter, autocast or other kernels change
every activation. So before a job the model runs on up to 64 ids that depend only on the vocabulary's size, and a sketch
of each site and layer, and of the model's output, is kept in the store. The output is for jobs with other sites:
any change inside a model reaches its output.

*Sketch.* For activations `x` `[tokens, width]`, `m` is the median of `|x|`, and `g = asinh(x / m)`, so that neither the
attention sink at the first token nor an outlier dimension, both hundreds of times the rest, hides all others. The
tokens are cut into 16 groups; for each group the sketch has the sum of `g` times random signs, divided by the square
root of the number of terms. The difference of two sketches is then normal, with the root mean square of the difference
of `g` (the lemma of Johnson and Lindenstrauss, with the signs of Achlioptas, 2003). `m` is kept too, for the scale.

*Tolerance.* The three groups that differ most are ignored, since rounding may send a token to another expert; the root
mean square of the others is compared. Measured on 14 families: in float32, threads and attention kernels change 6e-6 at
most, rounding to TF32 before each product 1.5e-3 at 4 layers and 5e-3 at 24; in bfloat16, attention kernels change 1e-2
at 4 layers, 4e-2 with experts and 1.1e-1 at 24. So the tolerances are 1e-2 and 1.5e-1. Other rotary angles change
1.3e-1 and more, another activation function 2.5e-1, one expert less 3e-1, a shorter window 8e-1, a vector of a tenth of
a layer's size 8e-2, weights in 8 bits 2e-2. Changes below the tolerance are seen by the exact digest in the numerics.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import crc32c
import numpy as np
import torch
from torch import nn

from mmcache.errors import CorruptError, PlanMismatchError, UnsupportedModelError
from mmcache.extraction.runner import forward
from mmcache.models.capture import capture, site_width
from mmcache.models.inference import context_length, vocabulary
from mmcache.system.arguments import outside

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from mmcache.extraction.settings import Settings
    from mmcache.models.capture import Captured

__all__ = ["Probe", "ProvenanceWarning", "check_fingerprint", "probe_model", "with_sites"]

_TOKENS, _GROUPS, _LEFT_OUT = 64, 16, 3
# The most columns of a model's output that are sketched: a vocabulary can have 250,000.
_COLUMNS = 4096
_TOLERANCES = {"float64": 1e-2, "float32": 1e-2, "float16": 5e-2, "bfloat16": 1.5e-1}
# How much the shape of a batch may change activations in one process: the larger of this and _ABOVE_NOISE times the
# change of a sequence that is not padded.
_ROUNDING = {"float64": 1e-6, "float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
_ABOVE_NOISE = 8.0


class ProvenanceWarning(UserWarning):
    """The provenance of activations is uncertain: says what is unknown and what is assumed."""


@dataclass(frozen=True)
class Probe:
    """The result of the pass over the fixed context.

    `widths` are those of the sites. `fingerprint` has the sketches, `{"tokens": n, "output": […], "sites": {site: [one
    sketch per layer]}}`; `digest` is exact, over every bit of the output (None without one). Both are None if the model
    is not deterministic. `padding_shows`: a sequence gets other activations if it is padded beside a longer one.
    """

    widths: dict[str, int]
    fingerprint: dict[str, Any] | None
    digest: str | None
    padding_shows: bool


def probe_model(
    model: nn.Module,
    sites: Sequence[str],
    layers: Sequence[int] | None,
    device: torch.device,
    batch_size: int | str,
) -> Probe:
    """Run a model on the fixed context: whole, twice in part, and both in one padded batch (240 tokens); blocks.

    Args:
        model: in eval mode, without its wrappers.
        sites: as in `capture`.
        layers: as in `capture`.
        device: that of the ids.
        batch_size: the job's; if the model cannot run two sequences in a batch, it must be 1.

    Raises:
        ShapeError: a site is not [batch, seq, width], or its width differs between layers.
        UnsupportedModelError: the model does not run on token ids alone.
        MmcacheError: as `capture`.
    """
    ids = _ids(_known_ids(model), min(_TOKENS, context_length(model, None)))
    short = ids[:, : max(1, 3 * ids.shape[1] // 8)]
    with capture(model, sites, layers) as captured:
        output = forward(model, captured, ids, np.ones_like(ids), device)
        widths = {site.name: site_width(site, captured[site.name], ids.shape[1]) for site in captured.sites}
        whole, made = dict(_rows(captured, 0)), _output(output)
        fingerprint = {"tokens": ids.shape[1], "output": _output_sketch(made), "sites": _sketches(whole)}
        # Of the output only, so that jobs with other sites can be compared.
        digest = None if made is None else _digest({("output", 0): made})
        alone, again = (_run(model, captured, short, device) for _ in range(2))
        steady = _digest(alone) == _digest(again)
        try:
            shows = _padding_shows(model, captured, ids, whole, alone, device)
        except UnsupportedModelError:
            if batch_size != 1:
                raise
            shows = True
    if not steady:
        warnings.warn(
            f"{type(model).__name__} gives other activations each time it sees the same tokens (dropout that stays on, "
            f"noise): a resume cannot be told from another model's, and no two runs make the same bytes",
            ProvenanceWarning,
            stacklevel=outside(),
        )
    return Probe(widths, fingerprint if steady else None, digest if steady else None, shows)


def _known_ids(model: nn.Module) -> int:
    """Ids below this are valid: the vocabulary size, or else the rows of the smallest embedding, or else 1."""
    known = vocabulary(model)
    if known is None:
        rows = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
        known = min(rows, default=1)
    return known


def _ids(known: int, tokens: int) -> np.ndarray:
    """The fixed context: `[1, tokens]` int64, a function of the vocabulary's size alone."""
    raw = np.random.PCG64(known).random_raw(tokens)  # raw bits are the same in all versions of numpy
    return (raw % known).astype(np.int64)[None]


def _run(model: nn.Module, captured: Captured, ids: np.ndarray, device: torch.device) -> dict[tuple[str, int], Any]:
    forward(model, captured, ids, np.ones_like(ids), device)
    return dict(_rows(captured, 0))


def _rows(captured: Captured, row: int) -> Iterator[tuple[tuple[str, int], torch.Tensor]]:
    """Activations of one sequence of a batch, by site and index of the layer: `[tokens, width]` on the CPU."""
    for site in captured.sites:
        for place, tensor in enumerate(captured[site.name]):
            yield (site.name, place), tensor[row].detach().contiguous().cpu()


def _digest(rows: dict[tuple[str, int], torch.Tensor]) -> str:
    whole = hashlib.sha256()
    for (site, place), tensor in rows.items():
        crc = crc32c.crc32c(tensor.reshape(-1).view(torch.uint8).numpy().data)
        whole.update(f"{site} {place} {crc:08x}\n".encode())
    return whole.hexdigest()[:32]


def _sketches(rows: dict[tuple[str, int], torch.Tensor]) -> dict[str, list[list[float] | None]]:
    sites: dict[str, list[list[float] | None]] = {}
    for (site, _), tensor in rows.items():
        sites.setdefault(site, []).append(_sketch(_plain(tensor)))
    return sites


def _output(returned: Any) -> torch.Tensor | None:
    """The first tensor that a model returned, as `[tokens, width]` on the CPU; None without a floating-point one."""
    found = returned
    while not isinstance(found, torch.Tensor):
        values = list(found.values()) if isinstance(found, dict) else found
        if not isinstance(values, (tuple, list)) or not values:
            return None
        found = next((value for value in values if isinstance(value, torch.Tensor)), values[0])
    if not found.is_floating_point() or found.ndim < 2:
        return None
    return found.detach().reshape(-1, found.shape[-1]).contiguous().cpu()


def _output_sketch(output: torch.Tensor | None) -> list[float] | None:
    if output is None:
        return None
    return _sketch(_plain(output[:, :: -(-output.shape[1] // _COLUMNS)]))


def _plain(tensor: torch.Tensor) -> np.ndarray:
    plain: np.ndarray = tensor.float().cpu().numpy().astype(np.float64)
    return plain


def _compressed(rows: np.ndarray) -> tuple[float, np.ndarray]:
    """The median of the absolute values, and `asinh(rows / median)`."""
    scale = float(np.median(np.abs(rows))) or float(np.abs(rows).mean()) or 1.0
    return scale, np.arcsinh(rows / scale)


def _sketch(rows: np.ndarray) -> list[float] | None:
    """The sketch of `[tokens, width]` float64: the scale, then a number per group; None if not all are finite."""
    if not np.isfinite(rows).all():
        return None
    scale, small = _compressed(rows)
    most = -(-len(rows) // _GROUPS)
    raw = np.random.PCG64(rows.shape[1]).random_raw(-(-most * rows.shape[1] // 64))
    bits = np.unpackbits(raw.view(np.uint8))[: most * rows.shape[1]].reshape(most, -1)
    signs = 1.0 - 2.0 * bits
    groups = np.array_split(small, min(_GROUPS, len(rows)))
    sums = [float((group * signs[: len(group)]).sum() / np.sqrt(group.size)) for group in groups]
    return [float(f"{number:.6g}") for number in (scale, *sums)]


def _difference(one: list[float] | None, other: list[float] | None) -> float:
    """The relative difference of two sketches; infinite if only one exists or their lengths differ."""
    if one is None or other is None or len(one) != len(other):
        return 0.0 if one is other else float("inf")
    scale = abs(np.log(one[0] / other[0]))
    squares = np.sort((np.array(one[1:]) - np.array(other[1:])) ** 2)
    counted = squares[: max(1, len(squares) - _LEFT_OUT)]
    return float(max(scale, np.sqrt(counted.mean())))


def _padding_shows(
    model: nn.Module,
    captured: Captured,
    ids: np.ndarray,
    whole: dict[tuple[str, int], torch.Tensor],
    alone: dict[tuple[str, int], torch.Tensor],
    device: torch.device,
) -> bool:
    """Whether the short sequence gets other activations if it is padded to the length of the whole one.

    All its tokens are compared: a model that mixes neighbours changes only the last ones before the padding.
    """
    tokens = next(iter(alone.values())).shape[0]
    padded, mask = np.repeat(ids, 2, axis=0), np.ones((2, ids.shape[1]), np.int64)
    padded[1, tokens:], mask[1, tokens:] = 0, 0
    forward(model, captured, padded, mask, device)
    together, beside = dict(_rows(captured, 0)), dict(_rows(captured, 1))
    for key, rows in whole.items():
        floor = _ROUNDING.get(str(rows.dtype).removeprefix("torch."), max(_ROUNDING.values()))
        noise = _apart(rows, together[key])
        if _apart(alone[key], beside[key][:tokens]) > max(floor, _ABOVE_NOISE * noise):
            return True
    return False


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The root mean square difference of two `[tokens, width]`, at the token that differs most."""
    rows, others = _plain(one), _plain(other)
    if not (np.isfinite(rows).all() and np.isfinite(others).all()):
        return 0.0 if np.array_equal(rows, others, equal_nan=True) else float("inf")
    scale, small = _compressed(rows)
    return float(np.sqrt(((small - np.arcsinh(others / scale)) ** 2).mean(1).max()))


def with_sites(stored: dict[str, Any] | None, asked: dict[str, Any] | None) -> dict[str, Any] | None:
    """A store's fingerprint with the sketches of added sites; None if either is None."""
    if stored is None or asked is None:
        return None
    return {**stored, "sites": {**asked["sites"], **stored["sites"]}}


def check_fingerprint(where: Path | str, stored: dict[str, Any] | None, settings: Settings) -> None:
    """Compare a store's fingerprint with that of the model now, at the shared sites and the output.

    Args:
        where: the store.
        stored: its fingerprint; None if the model was not deterministic.
        settings: this job's.

    Raises:
        PlanMismatchError: they differ by more than rounding; names the first place and the difference. Or only one of
            the models is deterministic.
        CorruptError: the stored value is no fingerprint.
    """
    asked = settings.fingerprint
    if stored is None or asked is None:
        if stored is not asked:
            then, now = ("differed", "are equal") if stored is None else ("were equal", "differ")
            raise PlanMismatchError(
                f"{where} was planned with a model of which two passes over the same tokens {then}, now they "
                f"{now}: look at dropout and hooks{_hooked(settings)}. Make it as it was, or choose another path"
            )
        return
    _check_form(where, stored)
    tolerance = _TOLERANCES.get(settings.identity["compute_dtype"], max(_TOLERANCES.values()))
    shared = [(site, stored["sites"][site], asked["sites"][site]) for site in stored["sites"] if site in asked["sites"]]
    places = [
        (f"{site} of layer {layer}", ours[place], now[place])
        for place, layer in enumerate(settings.layers)
        for site, ours, now in shared
    ]
    for name, one, other in [*places, ("the model's output", stored["output"], asked["output"])]:
        found = _difference(one, other)
        if found > tolerance:
            raise PlanMismatchError(
                f"{where} was planned with a model that computes something else: on {asked['tokens']} test tokens, "
                f"{name} is {found:.1%} off, and rounding explains {tolerance:.0%} at most. Its weights are "
                f"the same, so look at hooks{_hooked(settings)}, adapters, autocast, quantisation and the model's "
                f"code. Make it as it was, or choose another path"
            )


def _hooked(settings: Settings) -> str:
    return f" (on {', '.join(settings.hooked[:4])})" if settings.hooked else ""


def _check_form(where: Path | str, stored: Any) -> None:
    """Check the form of a root's fingerprint: the store may be from a stranger. Raises CorruptError."""
    try:
        sketches = [stored["output"], *(sketch for site in stored["sites"].values() for sketch in site)]
        fine = all(
            sketch is None or (sketch[0] > 0 and all(math.isfinite(number) for number in sketch)) for sketch in sketches
        )
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise CorruptError(f"{where} has a fingerprint that cannot be read ({error!r}): restore its root") from error
    if not fine:
        raise CorruptError(f"{where} has a fingerprint with numbers that none can have: restore its root")
