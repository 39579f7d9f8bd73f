"""The logit lens: the model's own head applied to a row at each layer.

After nostalgebraist, "interpreting GPT: the logit lens" (2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmcache.errors import ArgumentError, ShapeError, UnsupportedModelError
from mmcache.models.inference import text_config
from mmcache.models.loading import load_model
from mmcache.read.store import a_store
from mmcache.system.arguments import a_name, an_index, instance, layer_numbers, optional, public
from mmcache.view.base import Name, Sampler, View, written
from mmcache.view.tokens import Detokenizer, a_words, surroundings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from mmcache.read.store import Store

__all__ = ["Unembedding", "lens"]

# Names of the final norm in model families.
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


@dataclass(frozen=True)
class Unembedding:
    """The end of a model: its final norm and its head.

    Attributes:
        head: maps `[n, d_model]` to logits `[n, vocabulary]`.
        norm: applied to rows before the head; None for none.
        softcap: bound of the logits, by tanh, as in Gemma-2; None for no bound.
        d_model: the width of a row.
        dtype: the dtype of the computation.
    """

    head: Callable[[torch.Tensor], torch.Tensor]
    norm: Callable[[torch.Tensor], torch.Tensor] | None
    softcap: float | None
    d_model: int
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module) -> Unembedding:
        """The head of a transformers model, whose memory it shares.

        Raises:
            UnsupportedModelError: the model has no head, or no final norm of a known name.
        """
        find: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = find()
        if head is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no head that makes logits: load a causal language model"
            )
        base = getattr(model, "base_model", model)
        inner = getattr(base, "decoder", base)
        norm = next((found for name in _FINAL_NORMS if (found := getattr(inner, name, None)) is not None), None)
        if norm is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no final norm called {', '.join(_FINAL_NORMS)}: "
                f"make mmcache.view.Unembedding(head, norm, …) yourself"
            )
        softcap = getattr(text_config(model), "final_logit_softcapping", None)
        weight: torch.Tensor = head.weight
        return cls(head, norm, softcap, weight.shape[1], weight.dtype)

    @classmethod
    def load(cls, name: str, *, trust_remote_code: bool = False) -> Unembedding:
        """Load a model (a folder, a name on the hub, or `demo`), and take its head; blocks meanwhile.

        Args:
            name: the model's name.
            trust_remote_code: run Python code from the model's folder.

        Raises:
            UnsupportedModelError: there is no such model, or it has no head.
        """
        return cls.of(load_model(name, None, trust_remote_code=trust_remote_code))

    def logits(self, rows: np.ndarray) -> torch.Tensor:
        """The logits of rows `[n, d_model]`: float32 `[n, vocabulary]`."""
        with torch.inference_mode():
            wide = torch.from_numpy(rows).to(self.dtype)
            found = self.head(wide if self.norm is None else self.norm(wide)).float()
            return found if self.softcap is None else self.softcap * torch.tanh(found / self.softcap)


@public(
    store=a_store,
    site=a_name,
    position=an_index,
    unembedding=instance(Unembedding, "mmcache.view.Unembedding"),
    layers=optional(layer_numbers),
    k=an_index,
    words=optional(a_words),
)
def lens(
    store: Store,
    site: str,
    position: int,
    unembedding: Unembedding,
    *,
    layers: Sequence[int] | None = None,
    k: int = 8,
    words: Detokenizer | None = None,
) -> View:
    """The likeliest next tokens according to the model's head, from one token's row at every layer.

    Meant for the residual stream (`resid_post`, `resid_mid`, `resid_pre`), whose last layer gives the model's
    prediction.

    Args:
        store: the store.
        site: one of its sites.
        position: of the token; negative counts from the end.
        unembedding: the head of the model that made the store.
        layers: the model's numbers; None for all.
        k: tokens per layer.
        words: the store's detokenizer, if it was read already.

    `data`: `position`, `token`, `before`, `text`, `after`; `next`, the token that comes next in the sequence (-1:
    none), and `next_text`; `layers`; `tokens` `[L, k]` ids and `texts`, the likeliest first; `probabilities` `[L, k]`;
    `next_rank` `[L]`, from 0 (-1: none); `entropy` `[L]` in nats. NaN if a row is not finite.

    Raises:
        UnknownSiteError, OutOfRangeError, IncompleteError, CorruptError: as for reads.
        ShapeError: the unembedding has another width.
        ArgumentError: `k` is not 1 to the size of the vocabulary.
    """
    look = Sampler(store, site, layers)
    if look.view.d_model != unembedding.d_model:
        raise ShapeError(f"the unembedding takes rows of {unembedding.d_model}, {site} has {look.view.d_model}")
    place = store.locate(position)
    position %= store.n_tokens
    logits = unembedding.logits(look.rows(np.array([position]))[0])
    if not 1 <= k <= logits.shape[1]:
        raise ArgumentError(f"k is {k}: expected 1 to {logits.shape[1]}, the size of the vocabulary")
    chances = logits.double().softmax(dim=-1)
    largest = chances.nan_to_num(nan=-1.0).topk(k)
    behind = position + 1 < store.sequences[place.sequence].stop
    coming = int(store.read_tokens(position + 1, position + 2)[0]) if behind else -1
    rank = np.full(len(chances), -1)
    if 0 <= coming < logits.shape[1]:
        rank = (chances > chances[:, coming : coming + 1]).sum(dim=1).numpy()
    words = words or Detokenizer(store)
    data: dict[str, Any] = {
        "site": site, "position": position, "sequence": place.sequence, "offset": place.offset, "token": place.token_id,
        **surroundings(store, position, 12, words),
        "next": coming, "next_text": words.texts([coming])[0] if behind else "",
        "layers": look.layers,
        "tokens": largest.indices.numpy(),
        "texts": [words.texts(line) for line in largest.indices.tolist()],
        "probabilities": chances.gather(1, largest.indices).numpy(),
        "next_rank": rank,
        "entropy": -torch.special.xlogy(chances, chances).sum(dim=1).numpy(),
    }  # fmt: skip
    title = f"Logit lens at {position:,} of {site}"
    chosen = None if layers is None else list(layers)
    python = written(lens, site, position, Name("unembedding"), layers=chosen, k=k)
    return View("lens", title, python, data, None, look.bytes_read)
