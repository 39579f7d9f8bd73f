"""What a model does on a fixed short context: a sketch that other hardware gives too, and another model does not.

The identity of a model is not its weights alone: a changed `rope_theta`, a hook, an adapter, autocast or other kernels
change every activation. So a short pass is made before a job, of up to 64 ids that are a function of the vocabulary's
size alone, and a sketch of each site and layer, and of the model's own output, is kept in the store. The output's is
there for jobs with other sites: whatever changes inside a model reaches its output.

*Sketch.* Of activations `x` `[tokens, width]`, `m` is the median of `|x|`, and `g = asinh(x / m)`: so that neither the
attention sink at the first token nor an outlier dimension, both hundreds of times the rest, hides all others. The
tokens are cut into 16 groups, and of each group the sketch has the sum of `g` times random signs, divided by the root
of their number: of two sketches, the difference is normal, with the root mean square of the difference of `g` (the
lemma of Johnson and Lindenstrauss, with the signs of Achlioptas, 2003). `m` itself is kept too, for the scale.

*Tolerance.* The three groups that differ most are left out, since rounding may send a token to another expert; of the
others the root mean square counts. Measured on 14 families: in float32, threads and attention kernels change 6e-6 at
most, rounding to TF32 before each product 1.5e-3 at 4 layers and 5e-3 at 24; in bfloat16, attention kernels change 1e-2
at 4 layers, 4e-2 with experts and 1.1e-1 at 24. So 1e-2 and 1.5e-1 are let pass. Other rotary angles change 1.3e-1 and
more, another activation function 2.5e-1, one expert less 3e-1, a shorter window 8e-1, a vector of a tenth of a layer's
size 8e-2, weights in 8 bits 2e-2. What is smaller than the tolerance is seen by the exact digest, one of the numerics.
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
# Columns of a model's output that are looked at: a vocabulary has a quarter of a million.
_COLUMNS = 4096
_TOLERANCES = {"float64": 1e-2, "float32": 1e-2, "float16": 5e-2, "bfloat16": 1.5e-1}
# What the shape of a batch may change in one process, at least: eight times what it changes where nothing is padded.
_ROUNDING = {"float64": 1e-6, "float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
_ABOVE_NOISE = 8.0


class ProvenanceWarning(UserWarning):
    """Where activations come from is not known as well as it should be: what is unknown, and what was assumed."""


@dataclass(frozen=True)
class Probe:
    """What a model did on the fixed context.

    `widths` are the sites' own; `fingerprint` has the sketches, `{"tokens": n, "output": […], "sites": {site: [a sketch
    a layer]}}`, and `digest` is exact, of every bit; both are None for a model that gives something else each time.
    `padding_shows` says that a shorter sequence gets other activations where it is padded beside a longer one.
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
    """Run a model on the fixed context: whole, twice in part, and both in one padded batch; blocks for 240 tokens.

    Args:
        model: in eval mode, without its wrappers.
        sites: as in `capture`.
        layers: as there.
        device: where ids go.
        batch_size: the job's; a model that cannot run two sequences may only do one at a time.

    Raises:
        ShapeError: a site that is not [batch, seq, width], or whose width differs between layers.
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
        # Of the output alone: jobs with other sites have it too.
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
    """Ids below this can be given to a model; where it does not say, its smallest embedding does, else it is 1."""
    known = vocabulary(model)
    if known is None:
        rows = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
        known = min(rows, default=1)
    return known


def _ids(known: int, tokens: int) -> np.ndarray:
    """The fixed context: `[1, tokens]` int64, a function of the vocabulary's size alone."""
    raw = np.random.PCG64(known).random_raw(tokens)  # bits, which no version of numpy draws otherwise
    return (raw % known).astype(np.int64)[None]


def _run(model: nn.Module, captured: Captured, ids: np.ndarray, device: torch.device) -> dict[tuple[str, int], Any]:
    forward(model, captured, ids, np.ones_like(ids), device)
    return dict(_rows(captured, 0))


def _rows(captured: Captured, row: int) -> Iterator[tuple[tuple[str, int], torch.Tensor]]:
    """The activations of one sequence of a batch, by site and place of the layer: `[tokens, width]` on the CPU."""
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
    """The first tensor of floats in what a model returned, `[tokens, width]` of one sequence; None if there is none."""
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
    """The sketch of `[tokens, width]` float64: the scale, then a number a group; None where something is not finite."""
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
    """How far two sketches are apart, relative to what they are of; infinite where only one is there."""
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
    """Whether the short sequence gets other activations where it is padded to the length of the whole one.

    No token is left out: what mixes neighbours changes only the last ones before the padding.
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
    """The root mean square of the difference of two `[tokens, width]`, of the token that is most apart."""
    rows, others = _plain(one), _plain(other)
    if not (np.isfinite(rows).all() and np.isfinite(others).all()):
        return 0.0 if np.array_equal(rows, others, equal_nan=True) else float("inf")
    scale, small = _compressed(rows)
    return float(np.sqrt(((small - np.arcsinh(others / scale)) ** 2).mean(1).max()))


def with_sites(stored: dict[str, Any] | None, asked: dict[str, Any] | None) -> dict[str, Any] | None:
    """A store's fingerprint with the sketches of sites that are added to it; None where either is."""
    if stored is None or asked is None:
        return None
    return {**stored, "sites": {**asked["sites"], **stored["sites"]}}


def check_fingerprint(where: Path | str, stored: dict[str, Any] | None, settings: Settings) -> None:
    """Compare what a model did when a store was planned with what it does now, at all that both looked at.

    Args:
        where: the store.
        stored: its fingerprint; None where the model gave something else each time.
        settings: this job's.

    Raises:
        PlanMismatchError: they differ by more than rounding does; it names the first place, and by how much. Or only
            one of them is of a model that gives the same each time.
        CorruptError: what is stored is no fingerprint.
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
    """Check that what a root says is a fingerprint: it may have been sent by somebody. Raises CorruptError."""
    try:
        sketches = [stored["output"], *(sketch for site in stored["sites"].values() for sketch in site)]
        fine = all(
            sketch is None or (sketch[0] > 0 and all(math.isfinite(number) for number in sketch)) for sketch in sketches
        )
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise CorruptError(f"{where} has a fingerprint that cannot be read ({error!r}): restore its root") from error
    if not fine:
        raise CorruptError(f"{where} has a fingerprint with numbers that none can have: restore its root")
