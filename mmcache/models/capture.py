"""`capture`: forward hooks that collect the tensors at a model's sites, without copying or casting them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmcache.errors import (
    ArgumentError,
    IncompleteError,
    MmcacheError,
    ShapeError,
    UnknownSiteError,
    UnsupportedModelError,
)
from mmcache.models.inference import is_compiled, running, unwrap
from mmcache.models.sites import ResolvedSite, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch.utils.hooks import RemovableHandle

__all__ = ["Captured", "capture", "probe", "site_width"]


class _StopForwardError(MmcacheError):
    """Ends a forward pass from inside a hook. It never leaves the `with` statement of the capture that raised it.

    It derives from Exception because torch runs `always_call` hooks only then, and from MmcacheError because `running`
    would report any other as a failure of the model.
    """

    def __init__(self, owner: Captured) -> None:
        super().__init__("every wanted site has been captured")
        self.owner = owner


class Captured(Mapping[str, list[Tensor]]):
    """The tensors of the last forward pass by site: `captured["mlp_in"]` is a list with one tensor per layer.

    Each tensor is [batch, seq, d_model], in the order of the layers. They are the model's own tensors:
    nothing is copied, cast or detached, so they are on the model's device, in its dtype, and part of its
    autograd graph unless it ran under `torch.no_grad` or `torch.inference_mode`. They must not be written to.
    This object keeps them until the next forward pass begins; keep your own reference (or copy) of what you need
    for longer. The last pass stays readable after the `with` statement.

    Attributes:
        sites: The captured sites and their modules, in order.
    """

    def __init__(self, sites: tuple[ResolvedSite, ...], *, stop: bool = False) -> None:
        self.sites = sites
        self._by_name = {site.name: site for site in sites}
        self._stop = stop
        self._wanted = sum(len(site.layers) for site in sites)
        self._tensors: dict[tuple[str, int], Tensor] = {}
        self._begun = False
        self._running = False

    def __getitem__(self, name: str) -> list[Tensor]:
        """The tensors of the last forward pass at a site.

        Args:
            name: A site as given to `capture`; for a TransformerLens name, the site that it stands for, such as
                `resid_post` for `blocks.*.hook_resid_post`.

        Returns:
            A new list with one tensor per layer, [batch, seq, d_model] each; the tensors are the model's own.

        Raises:
            UnknownSiteError: The site is not captured.
            IncompleteError: No forward pass yet, or one in which a module of this site did not run.
        """
        if name not in self._by_name:
            raise UnknownSiteError(f"site {name!r} is not captured; captured are {', '.join(self._by_name)}")
        site = self._by_name[name]
        if not self._tensors and not self._begun:
            raise IncompleteError(
                f"site {name!r} has nothing yet: call the model inside `with capture(...)`, then read it"
            )
        for layer, module in zip(site.layers, site.modules, strict=True):
            if (name, layer) not in self._tensors:
                raise IncompleteError(
                    f"site {name!r}: module {module!r} (layer {layer}) did not run in the last forward pass: "
                    "capture only layers that the model calls, and run the pass to its end"
                )
        return [self._tensors[name, layer] for layer in site.layers]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __repr__(self) -> str:
        return f"Captured({', '.join(self._by_name)}: {len(self._tensors)} of {self._wanted} tensors)"

    def run(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call the model. With `stop=True` the pass ends once every wanted site has been captured.

        Args:
            call: The model, or anything that calls it.
            *args: Passed on to `call`.
            **kwargs: Passed on to `call`.

        Returns:
            What `call` returned, or None if the pass was ended early.

        Raises:
            Exception: Any error of `call`.
        """
        try:
            return call(*args, **kwargs)
        except _StopForwardError as stop:
            if stop.owner is not self:
                raise
        return None

    def _attach(self, root: nn.Module) -> Iterator[RemovableHandle]:
        """Register the hooks that fill this object, and yield the handle of each."""
        yield root.register_forward_pre_hook(self._begin, prepend=True)
        yield root.register_forward_hook(self._end, always_call=True)
        for site in self.sites:
            for layer, path in zip(site.layers, site.modules, strict=True):
                take = functools.partial(self._take, site, layer, path)
                module = root.get_submodule(path)
                if site.side == "in":
                    yield module.register_forward_pre_hook(_before(take), with_kwargs=True)
                else:
                    yield module.register_forward_hook(_after(take))

    def _begin(self, *_: Any) -> None:
        # Cleared before the pass, not during it, so that the tensors of two passes are never held at once.
        self._tensors.clear()
        self._begun = self._running = True

    def _end(self, *_: Any) -> None:
        self._running = False

    def _take(self, site: ResolvedSite, layer: int, module: str, value: object) -> None:
        if not isinstance(value, Tensor):
            verb = "was given" if site.side == "in" else "returned"
            raise ArgumentError(
                f"site {site.name!r}: module {module!r} {verb} {_said(value)}, and only a tensor, or a tuple "
                "that begins with one, can be captured: choose a module further in"
            )
        key = (site.name, layer)
        if key in self._tensors:
            if self._running:
                _check_equal(self._tensors[key], value, module)
                return
            # The model's own forward is not running, so the caller calls its layers: a module that runs again
            # begins a new pass.
            self._tensors.clear()
        self._tensors[key] = value
        if self._stop and len(self._tensors) == self._wanted:
            raise _StopForwardError(self)


@contextmanager
def capture(
    model: nn.Module,
    sites: Sequence[str] = ("mlp_in", "mlp_out"),
    layers: Sequence[int] | None = None,
    *,
    stop: bool = False,
) -> Iterator[Captured]:
    """Capture activations during the forward passes inside a `with` statement.

    ```python
    with mmcache.capture(model, sites=("mlp_in", "mlp_out")) as captured:
        model(**inputs)
    captured["mlp_in"]  # a list: one [batch, seq, d_model] per layer
    ```

    Hooks are registered on entry and removed on exit, also after an exception; captures may be nested. Hooks that
    were registered before run first, so interventions are captured too. A compiled model runs uncompiled inside
    the `with` statement, because compiled code ignores hooks that are registered later. With gradient checkpointing,
    read before the backward pass, which runs parts of the model again.

    Args:
        model: Any torch model, wrapped or not; see `mmcache.models.inference.unwrap` for wrappers and
            `mmcache.models.sites` for sites.
        sites: Site names.
        layers: The model's own layer numbers; None means all.
        stop: End each forward pass as soon as every wanted site has been captured, so that later layers and
            logits are not computed. Call the model through `captured.run(model, **inputs)`, which then
            returns None; a direct call leaves the `with` statement there, without an error.

    Yields:
        The tensors of the last forward pass by site: [batch, seq, d_model] per layer, the model's own memory.

    Raises:
        UnknownSiteError: A site that this model does not have, with near matches; before any forward pass.
        UnsupportedModelError: A standard name in a model of unknown family; or, in the pass, a module that runs
            more than once with different values.
        OutOfRangeError: A layer that is not in the model.
        ArgumentError: Sites or layers given twice, or sites that differ in layers; or, in the pass, a module whose
            input or output is no tensor.
    """
    captured = Captured(resolve(model, sites, layers), stop=stop)
    with ExitStack() as stack:
        if is_compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for handle in captured._attach(unwrap(model)):  # noqa: SLF001 - for this function alone
            stack.callback(handle.remove)
        try:
            yield captured
        except _StopForwardError as stopped:
            if stopped.owner is not captured:
                raise


def probe(model: nn.Module, sites: Sequence[str], layers: Sequence[int] | None = None) -> dict[str, int]:
    """The width of each site, from one forward pass over two tokens.

    The pass runs to its end under `torch.inference_mode`, in the model's current mode (train or eval).

    Args:
        model: A language model or encoder, whose first argument is token ids [batch, seq], wrapped or not.
        sites: Site names.
        layers: The model's own layer numbers; None means all.

    Returns:
        The width (d_model) of each site, by its resolved name, in order.

    Raises:
        ShapeError: A site that is not [batch, seq, width], or whose width differs between layers.
        IncompleteError: A site with a module that did not run.
        UnsupportedModelError: The model does not run on token ids alone; its error is in the message.
        UnknownSiteError: As `capture`; so are UnsupportedModelError, OutOfRangeError and ArgumentError.
    """
    inner = unwrap(model)
    device = next((weight.device for weight in inner.parameters() if weight.device.type != "meta"), "cpu")
    # Two tokens, so that [seq, batch, width] is not mistaken for [batch, seq, width].
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    options: dict[str, Any] = {"use_cache": False, "attention_mask": torch.ones_like(tokens)}
    accepted = inspect.signature(inner.forward).parameters
    with torch.inference_mode(), capture(model, sites, layers) as captured, running(inner, tokens):
        inner(tokens, **{name: value for name, value in options.items() if name in accepted})
    return {site.name: site_width(site, captured[site.name], 2) for site in captured.sites}


def _before(take: Callable[[object], None]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            take(args[0])
            return
        tensors = [value for value in kwargs.values() if isinstance(value, Tensor)]
        take(kwargs.get("hidden_states", tensors[0] if len(tensors) == 1 else kwargs))

    return hook


def _after(take: Callable[[object], None]) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: object) -> None:
        take(output[0] if isinstance(output, tuple) and output else output)

    return hook


def _check_equal(held: Tensor, value: Tensor, module: str) -> None:
    if held.shape != value.shape or not torch.equal(held, value):
        raise UnsupportedModelError(
            f"module {module!r} ran more than once in one forward pass, with different values, and a site "
            "holds one tensor a layer: choose a module that runs once a pass"
        )


def site_width(site: ResolvedSite, tensors: list[Tensor], tokens: int) -> int:
    """The width of a site, from its tensors (one per layer) for one sequence of `tokens` tokens.

    Raises:
        ShapeError: a tensor that is not [1, tokens, width], or widths that differ between layers.
    """
    widths = []
    for tensor, module in zip(tensors, site.modules, strict=True):
        if tensor.ndim != 3 or tensor.shape[:2] != (1, tokens):
            raise ShapeError(
                f"site {site.name!r}: module {module!r} has shape {list(tensor.shape)} for 1 sequence of {tokens} "
                f"tokens, expected [1, {tokens}, width]: choose a module that works on [batch, seq, width]"
            )
        widths.append(tensor.shape[2])
    if len(set(widths)) > 1:
        raise ShapeError(
            f"site {site.name!r} has different widths over its layers ({', '.join(map(str, widths))}), and a "
            "store holds one width a site: capture layers of one width"
        )
    return widths[0]


def _said(value: object) -> str:
    if isinstance(value, dict):
        return f"a {type(value).__name__} of {', '.join(map(str, value)) or 'nothing'}"
    return f"a {type(value).__name__}"
