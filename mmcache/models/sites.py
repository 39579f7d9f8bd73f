"""What a site is in a given model: names and module paths resolved to modules, before any forward pass.

A site is named in one of three ways:

- a standard name (`SITES`), in the families of `mmcache.models.families`;
- a module path with `*` for the layer number and an explicit side, `model.layers.*.mlp:out`, in any
  `nn.Module`. A path without `*` is a site of one layer, called layer 0;
- a TransformerLens name, `blocks.3.hook_resid_post` or `blocks.*.hook_resid_post`, which names a site and its
  layers at once. Names that mean something else than they seem to are refused. In a TransformerLens model,
  every other hook point is accepted too, by its own name.

Nothing here imports transformers: a family is recognised by `config.model_type` and by the modules that are
there.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from mmcache.errors import ArgumentError, OutOfRangeError, UnknownSiteError, UnsupportedModelError
from mmcache.models.families import ABSENT, ALIASES, NOT_ALIASES, SITES, TABLE
from mmcache.models.wrappers import unwrap
from mmcache.system.arguments import layer_numbers, names

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["SITES", "ResolvedSite", "describe", "resolve", "unwrap"]

Side = Literal["in", "out"]

_TRANSFORMER_LENS = re.compile(r"blocks\.(\*|\d+)\.([\w.]*hook_\w+)")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class ResolvedSite:
    """A site and the modules it is read from.

    Attributes:
        name: What a store calls it: the standard name, or the module path as it was given.
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
        layers: The layers to keep, in any order. None means those that a TransformerLens name says, or all.

    Returns:
        One entry for each site, in the order given, all with the same layers. A site that several
        TransformerLens names share (`blocks.0.hook_mlp_out`, `blocks.1.hook_mlp_out`) is one entry.

    Raises:
        UnknownSiteError: A site that this model does not have; the message lists near matches, or says why.
        UnsupportedModelError: A standard name in a model whose family is not known.
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
    """Every standard site that the model has, with all its layers, in the order of `SITES`.

    Args:
        model: A model of a known family, wrapped or not.

    Returns:
        One entry for each standard site; a site that the family lacks is left out.

    Raises:
        UnsupportedModelError: The model's family is not known; the message says how to name its modules.
    """
    return tuple(_Finder(unwrap(model)).standard().values())


class _Finder:
    """One model's modules and family, looked up once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kind = type(model).__name__
        # Duplicates stay in: a module shared between layers is at each of its paths.
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
        """The site that `text` names, with all its layers, and the one layer that `text` itself picks."""
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
        """The paths of the decoder layers: the one list of modules that all have what the family needs."""
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
        """A site at a TransformerLens hook point, or at a module, of every block that has it."""
        found = {}
        for number, _ in enumerate(self.modules["blocks"].children()):
            path = f"blocks.{number}.{inside}"
            # hook_dict also knows TransformerBridge's aliases, which are no module paths of their own.
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
    """`site` with only the layers that were asked for, or that its own TransformerLens names picked."""
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
