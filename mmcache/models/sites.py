"""Resolve site names to the modules of a model, before any forward pass; the table of model families.

A site is named in one of three ways:

- a standard name (`SITES`), in the families of `TABLE`;
- a module path with `*` for the layer number and an explicit side, `model.layers.*.mlp:out`, in any
  `nn.Module`. A path without `*` is a site of one layer, called layer 0;
- a TransformerLens name, `blocks.3.hook_resid_post` or `blocks.*.hook_resid_post`, which names a site and its
  layers at once. Names that do not mean what they seem to mean are refused. In a TransformerLens model, every
  other hook point is accepted too, by its own name.

Nothing here imports transformers: a family is recognised by `config.model_type` and by the model's modules.

`TABLE` has, for each known family, the module whose input or output each site is. A place is written as in a module
path: a module inside one layer, then `:in` or `:out`; an empty path is the layer itself. The definitions are the same
in every family: `resid_pre`, `resid_mid` and `resid_post` are the residual stream before, between and after the layer's
two halves, `attn_out` and `mlp_out` are what is *added* to the stream (so after a post-norm and after a residual
dropout), and `mlp_in` is the MLP module's own input.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

from torch import nn

from mmcache.errors import ArgumentError, OutOfRangeError, UnknownSiteError, UnsupportedModelError
from mmcache.models.inference import unwrap
from mmcache.system.arguments import layer_numbers, names

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["ABSENT", "ALIASES", "NOT_ALIASES", "SITES", "TABLE", "ResolvedSite", "describe", "resolve", "unwrap"]

SITES: Final[tuple[str, ...]] = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_in", "mlp_out")

_PRE_NORM = (":in", "post_attention_layernorm:in", ":out", "self_attn:out", "mlp:in", "mlp:out")
_SANDWICH_NORM = (
    ":in",
    "pre_feedforward_layernorm:in",
    ":out",
    "post_attention_layernorm:out",
    "mlp:in",
    "post_feedforward_layernorm:out",
)

# family → one place for each of SITES, in that order; None if the family has no such site (see ABSENT).
# The families are transformers' `config.model_type`, plus "gpt_neox (sequential)" for a GPT-NeoX with
# use_parallel_residual=False, and "transformer_lens", whose places are mostly TransformerLens' own hook points.
TABLE: Final[Mapping[str, tuple[str | None, ...]]] = MappingProxyType(
    {
        "gpt2": (":in", "ln_2:in", ":out", "attn:out", "mlp:in", "mlp:out"),
        "gpt_neox": (":in", None, ":out", "post_attention_dropout:out", "mlp:in", "post_mlp_dropout:out"),
        "gpt_neox (sequential)": (
            ":in",
            "post_attention_layernorm:in",
            ":out",
            "post_attention_dropout:out",
            "mlp:in",
            "post_mlp_dropout:out",
        ),
        "llama": _PRE_NORM,
        "mistral": _PRE_NORM,
        "qwen2": _PRE_NORM,
        "qwen3": _PRE_NORM,
        "gemma2": _SANDWICH_NORM,
        "gemma3": _SANDWICH_NORM,
        "gemma3_text": _SANDWICH_NORM,
        "phi3": (
            ":in",
            "post_attention_layernorm:in",
            ":out",
            "resid_attn_dropout:out",
            "mlp:in",
            "resid_mlp_dropout:out",
        ),
        "olmo2": (
            ":in",
            "mlp:in",
            ":out",
            "post_attention_layernorm:out",
            "mlp:in",
            "post_feedforward_layernorm:out",
        ),
        "transformer_lens": (
            "hook_resid_pre:out",
            "hook_resid_mid:out",
            "hook_resid_post:out",
            "hook_attn_out:out",
            "mlp:in",
            "hook_mlp_out:out",
        ),
    }
)

_PARALLEL = (
    "in parallel blocks attention and MLP both read resid_pre, so there is no residual stream between them "
    "(resid_pre + attn_out + mlp_out = resid_post)"
)
ABSENT: Final[Mapping[tuple[str, str], str]] = MappingProxyType(
    {
        ("gpt_neox", "resid_mid"): _PARALLEL,
        ("transformer_lens", "resid_mid"): f"it has no hook_resid_mid; {_PARALLEL}",
    }
)

# TransformerLens hook names that are exactly one of our sites in every family. In its post-norm families, too,
# hook_attn_out and hook_mlp_out come after the norm, just before the addition.
ALIASES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "hook_resid_pre": "resid_pre",
        "hook_resid_mid": "resid_mid",
        "hook_resid_post": "resid_post",
        "hook_attn_out": "attn_out",
        "hook_mlp_out": "mlp_out",
    }
)

# TransformerLens hook names that look like one of our sites but are not: what they are, and what to use instead.
NOT_ALIASES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "hook_mlp_in": "the residual stream before the MLP's norm: use 'resid_mid' for that ('resid_pre' in "
        "parallel blocks), or 'mlp_in' for what the MLP module reads",
        "ln2.hook_normalized": "the norm's output before its learned weight and bias, which is not what the "
        "MLP reads: use 'mlp_in' for the MLP module's input",
        "mlp.hook_in": "the TransformerBridge name for the MLP module's own input: use 'mlp_in'",
        "mlp.hook_pre": "the MLP's hidden layer before its activation function: use a module path to the "
        "MLP's first linear module with ':out'",
        "mlp.hook_post": "the MLP's hidden layer after its activation function: use a module path to the "
        "MLP's last linear module with ':in'",
        "ln1.hook_normalized": "the norm's output before its learned weight and bias, which is not what "
        "attention reads: use a module path to the attention module with ':in'",
        "hook_attn_in": "the residual stream, copied for each head, before the attention's norm: use 'resid_pre'",
        "attn.hook_z": "the heads' outputs before the output projection, [batch, seq, heads, d_head]: use a "
        "module path to the output projection with ':in'",
        "attn.hook_result": "one output for each head: use 'attn_out' for their sum",
    }
)


Side = Literal["in", "out"]

_TRANSFORMER_LENS = re.compile(r"blocks\.(\*|\d+)\.([\w.]*hook_\w+)")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class ResolvedSite:
    """A site and the modules that it is read from.

    Attributes:
        name: Its name in a store: the standard name, or the module path as given.
        layers: The model's own layer numbers, ascending.
        modules: The dotted path of each layer's module, relative to the unwrapped model, in order of
            `layers`.
        side: Whether it is the modules' input or their output.
    """

    name: str
    layers: tuple[int, ...]
    modules: tuple[str, ...]
    side: Side


def resolve(model: nn.Module, sites: Sequence[str], layers: Sequence[int] | None = None) -> tuple[ResolvedSite, ...]:
    """Find the modules that `sites` name, without running the model.

    Args:
        model: Any torch model, wrapped or not.
        sites: Site names, in the order wanted.
        layers: The layers to keep, in any order. None means those of a TransformerLens name, or all.

    Returns:
        One entry for each site, in the order given, all with the same layers. Several TransformerLens names of
        one site (`blocks.0.hook_mlp_out`, `blocks.1.hook_mlp_out`) are one entry.

    Raises:
        UnknownSiteError: A site that this model does not have; the message lists near matches, or says why.
        UnsupportedModelError: A standard name in a model of unknown family.
        OutOfRangeError: A layer that is not in the model, negative numbers included.
        ArgumentError: No sites, a site or layer given twice, or sites whose layers differ.
    """
    sites = names("sites", sites)
    asked = None if layers is None else _checked(layers)
    finder = _Finder(unwrap(model))
    found: dict[str, ResolvedSite] = {}
    named: dict[str, list[int] | None] = {}
    for text in sites:
        site, layer = finder.find(text)
        before = named.get(site.name, [])
        if site.name in found and (before is None or layer is None or layer in before):
            raise ArgumentError(f"site {site.name!r} is given twice in {list(sites)}: name each site once")
        found[site.name] = site
        named[site.name] = None if layer is None else [*(before or []), layer]
    if not found:
        raise ArgumentError(f"no sites given: name at least one, such as {', '.join(map(repr, SITES))}")
    picked = tuple(_pick(site, asked, named[name]) for name, site in found.items())
    _check_same_layers(picked)
    return picked


def describe(model: nn.Module) -> tuple[ResolvedSite, ...]:
    """The standard sites that the model has, with all their layers, in the order of `SITES`.

    Args:
        model: A model of a known family, wrapped or not.

    Returns:
        One entry for each standard site; a site that the family lacks is left out.

    Raises:
        UnsupportedModelError: The model's family is unknown; the message says how to name its modules.
    """
    return tuple(_Finder(unwrap(model)).standard().values())


class _Finder:
    """One model's modules and family, looked up once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kind = type(model).__name__
        # With duplicates: a module that layers share is listed under each of its paths.
        self.modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.hooks: Mapping[str, nn.Module] = getattr(model, "hook_dict", {})
        self.family = self._family()

    def _family(self) -> str | None:
        if self.hooks and "blocks" in self.modules:
            return "transformer_lens"
        config = getattr(self.model, "config", None)
        family = getattr(config, "model_type", None)
        if family == "gpt_neox" and not getattr(config, "use_parallel_residual", True):
            return "gpt_neox (sequential)"
        return family if isinstance(family, str) and family in TABLE else None

    def find(self, text: str) -> tuple[ResolvedSite, int | None]:
        """The site that `text` names, with all its layers, and the one layer in `text`, or None."""
        if ":" in text:
            return self._by_path(text), None
        if text in SITES:
            return self._by_name(text), None
        if match := _TRANSFORMER_LENS.fullmatch(text):
            layer, hook = match.groups()
            site = self._by_name(ALIASES[hook]) if hook in ALIASES else self._by_hook(text, hook)
            return site, None if layer == "*" else int(layer)
        if text in self.hooks:
            return ResolvedSite(f"{text}:out", (0,), (self._path(self.hooks[text]),), "out"), None
        raise self._unknown(text)

    def standard(self) -> dict[str, ResolvedSite]:
        """Every standard site of the family."""
        if self.family is None:
            raise self._unsupported()
        places = {site: place for site, place in zip(SITES, TABLE[self.family], strict=True) if place}
        if self.family == "transformer_lens":
            sites = {name: self._at_hook(name, *_split(place)) for name, place in places.items()}
            return {name: site for name, site in sites.items() if site.layers}
        if getattr(getattr(self.model, "config", None), "add_cross_attention", False):
            raise UnsupportedModelError(
                f"{self.kind} has cross-attention, which also adds to the residual stream, so the standard "
                "sites do not describe it: use module paths"
            )
        layers = self._layers({module for module, _ in map(_split, places.values()) if module})
        return {
            name: ResolvedSite(name, tuple(range(len(layers))), tuple(_join(at, module) for at in layers), side)
            for name, place in places.items()
            for module, side in [_split(place)]
        }

    def _layers(self, needed: set[str]) -> list[str]:
        """Paths of the decoder layers: those of the only module list whose members all have the `needed` modules."""
        lists = [
            [f"{path}.{number}" for number in range(len(module))]
            for path, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module)
            if all(needed <= {name for name, _ in layer.named_children()} for layer in module)
        ]
        if len(lists) != 1:
            raise UnsupportedModelError(
                f"{self.kind} says it is of the {self.family} family, but {len(lists)} of its module lists "
                f"hold layers of that family (with {', '.join(sorted(needed))}), not one: use module paths"
            )
        return lists[0]

    def _by_name(self, name: str) -> ResolvedSite:
        sites = self.standard()
        if name not in sites:
            why = ABSENT.get((str(self.family), name), "its layers have no such module")
            raise UnknownSiteError(f"{self.kind} ({self.family}) has no {name}: {why}. It has {', '.join(sites)}")
        return sites[name]

    def _at_hook(self, name: str, inside: str, side: Side) -> ResolvedSite:
        """A site at a TransformerLens hook point, or at a module, in every layer that has it."""
        found = {}
        for number, _ in enumerate(self.modules["blocks"].children()):
            path = f"blocks.{number}.{inside}"
            # hook_dict also has TransformerBridge's aliases, which are no module paths.
            module = self.hooks.get(path, self.modules.get(path))
            if module is not None:
                found[number] = self._path(module)
        return ResolvedSite(name, tuple(found), tuple(found.values()), side)

    def _path(self, wanted: nn.Module) -> str:
        return next(path for path, module in self.modules.items() if module is wanted)

    def _by_hook(self, text: str, hook: str) -> ResolvedSite:
        if self.family == "transformer_lens":
            site = self._at_hook(f"blocks.*.{hook}:out", hook, "out")
            if site.layers:
                return site
        elif hook in NOT_ALIASES:
            raise UnknownSiteError(f"{text!r} is no site of {self.kind}. It is {NOT_ALIASES[hook]}")
        raise self._unknown(text)

    def _by_path(self, text: str) -> ResolvedSite:
        path, side = _split(text)
        if path.count("*") > 1:
            raise ArgumentError(f"site {text!r} has more than one '*': it stands for the layer number, once")
        if side not in {"in", "out"} or not path:
            raise UnknownSiteError(f"site {text!r} must be a module path and then ':in' or ':out'")
        if path in self.modules:
            return ResolvedSite(text, (0,), (path,), side)
        pattern = re.compile(re.escape(path).replace(r"\*", r"(\d+)"))
        matches = ((pattern.fullmatch(module), module) for module in self.modules)
        found = {int(match[1]): module for match, module in matches if match and "*" in path}
        if not found:
            raise self._unknown(text)
        layers = tuple(sorted(found))
        return ResolvedSite(text, layers, tuple(found[layer] for layer in layers), side)

    def _unknown(self, text: str) -> UnknownSiteError:
        path, colon, side = text.partition(":")
        patterns = {_NUMBER.sub("*", module, count=1) for module in self.modules if module}
        if not colon and (path in self.modules or path in patterns):
            near = [f"{path}:in", f"{path}:out"]
        elif colon:
            near = [f"{match}:{side}" for match in difflib.get_close_matches(path, patterns)]
        else:
            hooks = {_NUMBER.sub("*", name, count=1) for name in self.hooks}
            names = {*SITES, *(f"blocks.*.{alias}" for alias in ALIASES), *hooks}
            near = difflib.get_close_matches(_NUMBER.sub("*", path, count=1), names)
        hint = f"near matches: {', '.join(near)}" if near else f"standard sites are {', '.join(SITES)}"
        return UnknownSiteError(
            f"{self.kind} has no site {text!r}; {hint}. Modules are named by path, with '*' for the layer "
            "number and ':in' or ':out'"
        )

    def _unsupported(self) -> UnsupportedModelError:
        lists = [f"{path}.*:out" for path, module in self.modules.items() if isinstance(module, nn.ModuleList)]
        example = lists[0] if lists else next((f"{path}:out" for path in self.modules if path), "path:out")
        model_type = getattr(getattr(self.model, "config", None), "model_type", None)
        said = f" (model_type {model_type!r})" if model_type else ""
        return UnsupportedModelError(
            f"{self.kind}{said} is of no known family ({', '.join(TABLE)}), so it has no standard sites: "
            f"name modules by path, with '*' for the layer number and ':in' or ':out', such as {example!r}"
        )


def _split(place: str) -> tuple[str, Any]:
    path, _, side = place.partition(":")
    return path, side


def _join(layer: str, inside: str) -> str:
    return f"{layer}.{inside}" if inside else layer


def _checked(layers: Iterable[int]) -> list[int]:
    numbers = layer_numbers("layers", layers)
    if not numbers:
        raise ArgumentError("layers is empty: name at least one, or leave it out for all of them")
    if len(set(numbers)) < len(numbers):
        raise ArgumentError(f"layers has duplicates: {numbers}; name each layer once")
    return sorted(numbers)


def _pick(site: ResolvedSite, asked: list[int] | None, named: list[int] | None) -> ResolvedSite:
    """`site` with only the layers that were asked for or are in its TransformerLens names."""
    if asked is not None and named is not None and asked != sorted(named):
        raise ArgumentError(
            f"site {site.name!r} is named with layers {sorted(named)} but layers={asked}: say the layers once"
        )
    at = dict(zip(site.layers, site.modules, strict=True))
    wanted = asked or sorted(named or site.layers)
    for layer in wanted:
        if layer not in at:
            if site.layers == tuple(range(len(at))):
                raise OutOfRangeError(f"layer {layer} not in model (n_layers={len(at)})")
            there = ", ".join(map(str, site.layers))
            raise OutOfRangeError(f"layer {layer} has no {site.name!r} in this model; layers that do: {there}")
    return replace(site, layers=tuple(wanted), modules=tuple(at[layer] for layer in wanted))


def _check_same_layers(sites: tuple[ResolvedSite, ...]) -> None:
    first = sites[0]
    for site in sites[1:]:
        if site.layers != first.layers:
            raise ArgumentError(
                f"sites must have the same layers: {first.name!r} has {list(first.layers)}, {site.name!r} "
                f"has {list(site.layers)}. Choose layers that both have, or capture the two apart"
            )
