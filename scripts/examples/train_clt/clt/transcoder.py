"""The transcoder: its computation and its losses."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["CrossLayerTranscoder", "JumpReLU", "losses"]

BANDWIDTH, FIRST_THRESHOLD = 1.0, 0.1  # of JumpReLU, for rows of norm sqrt(d_model)
SATURATION = 4.0  # of the sparsity penalty: Anthropic's c
REVIVAL = 1e-5  # weight of the pre-activation penalty
MEMORY = 0.95  # how much of the old cutoff a batch keeps, with TopK


class JumpReLU(torch.autograd.Function):
    """The input where it exceeds its threshold, else 0; the threshold gets a gradient, although the step has none.

    Straight-through estimator of Rajamanoharan et al. 2024 (arXiv:2407.14435): a rectangle of width `BANDWIDTH` around
    the threshold replaces the step's derivative, so d/dthreshold = -threshold / width inside it. The threshold is
    trained directly, as in SAELens and dictionary_learning: under Adam, its logarithm hardly moves.
    """

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        """`value * (value > threshold)`; both have the same shape."""
        ctx.save_for_backward(value, threshold)
        return value * (value > threshold)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of the value (exact off the step) and of the threshold (estimated)."""
        value, threshold = ctx.saved_tensors
        near = (value - threshold).abs() < BANDWIDTH / 2
        return upstream[0] * (value > threshold), -upstream[0] * near * threshold / BANDWIDTH


class CrossLayerTranscoder(torch.nn.Module):
    """An encoder per layer; its features have decoders to the same layer and to every later one.

    Args:
        n_layers, d_model, features: sizes; `features` is per layer.
        k: None for JumpReLU with a learnt threshold per feature. A number for TopK: in each layer, the `k * batch`
            features of a batch that write most (activation times decoder norm) are active, k per token on average. In
            eval mode, the threshold is the mean of what the last active feature of each batch wrote (BatchTopK,
            Bussmann et al. 2024, arXiv:2412.06410), so that the active features no longer depend on the batch, and can
            be saved.
    """

    cutoff: torch.Tensor

    def __init__(self, n_layers: int, d_model: int, features: int, k: int | None = None) -> None:
        super().__init__()
        reads, writes = features**-0.5, (n_layers * d_model) ** -0.5  # both uniform, as in Ameisen et al.
        shape = (n_layers, features)
        self.W_enc = torch.nn.Parameter(torch.empty(*shape, d_model).uniform_(-reads, reads))
        self.W_dec = torch.nn.ParameterList(
            torch.empty(features, n_layers - layer, d_model).uniform_(-writes, writes) for layer in range(n_layers)
        )
        self.b_enc = torch.nn.Parameter(torch.zeros(shape))
        self.b_dec = torch.nn.Parameter(torch.zeros(n_layers, d_model))
        self.k = k
        if k is None:
            self.threshold = torch.nn.Parameter(torch.full(shape, FIRST_THRESHOLD))
        else:
            self.register_buffer("cutoff", torch.zeros(n_layers))

    def norms(self) -> torch.Tensor:
        """The norm of everything that each feature writes: `[n_layers, features]`."""
        return torch.stack([decoder.flatten(1).norm(dim=1) for decoder in self.W_dec])

    def thresholds(self) -> torch.Tensor:
        """What a pre-activation must exceed: `[n_layers, features]`."""
        return self.threshold.relu() if self.k is None else self.cutoff[:, None] / self.norms().detach()

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pre-activations and activations, `[n_layers, batch, features]`, of rows `[batch, n_layers, d_model]`."""
        before = torch.baddbmm(self.b_enc[:, None], rows.transpose(0, 1), self.W_enc.transpose(1, 2))
        if self.k is None or not self.training:
            thresholds = self.thresholds()[:, None].expand_as(before)
            active: torch.Tensor = JumpReLU.apply(before, thresholds)  # type: ignore[no-untyped-call]
            return before, active
        written = before.detach().relu() * self.norms().detach()[:, None]
        least = written.flatten(1).topk(self.k * len(rows), sorted=False).values.amin(dim=1)
        self.cutoff.copy_(torch.where(self.cutoff > 0, torch.lerp(least, self.cutoff, MEMORY), least))
        return before, before.relu() * (written >= least[:, None, None])

    def decode(self, active: torch.Tensor) -> torch.Tensor:
        """What the features of `[n_layers, batch, features]` write: `[batch, n_layers, d_model]`."""
        written = self.b_dec.expand(active.shape[1], *self.b_dec.shape).clone()
        for layer, decoder in enumerate(self.W_dec):
            written[:, layer:] += (active[layer] @ decoder.flatten(1)).unflatten(1, decoder.shape[1:])
        return written

    @torch.no_grad()
    def folded(self, read_scale: torch.Tensor, write_scale: torch.Tensor) -> CrossLayerTranscoder:
        """The JumpReLU transcoder that is for raw rows what this one is for scaled rows.

        Args:
            read_scale: `[n_layers, d_model]`, the factors of the raw inputs.
            write_scale: the same for the outputs.
        """
        n_layers, d_model = self.b_dec.shape
        raw = CrossLayerTranscoder(n_layers, d_model, self.b_enc.shape[1]).to(self.b_dec)
        raw.W_enc.copy_(self.W_enc * read_scale[:, None])
        for layer, decoder in enumerate(self.W_dec):
            raw.W_dec[layer].copy_(decoder / write_scale[layer:])
        raw.b_enc.copy_(self.b_enc)
        raw.b_dec.copy_(self.b_dec / write_scale)
        raw.threshold.copy_(self.thresholds())
        return raw


def losses(clt: CrossLayerTranscoder, reads: torch.Tensor, writes: torch.Tensor, penalty: float) -> dict[str, Any]:
    """The loss, its error part, and the number of active features of a layer per token.

    The error is the mean square over d_model, summed over layers. JumpReLU adds the sparsity penalty of Ameisen et al.,
    tanh(c * activation * decoder norm). Both add the pre-activation penalty, which pulls features that are never active
    back to their thresholds (Anthropic, "Circuits Updates - January 2025").
    """
    before, active = clt.encode(reads)
    norms = clt.norms()[:, None]
    error = (clt.decode(active) - writes).square().mean(dim=-1).sum(dim=-1).mean()
    loss = error + REVIVAL * ((clt.thresholds()[:, None] - before).relu() * norms).sum(dim=(0, 2)).mean()
    if clt.k is None:
        loss = loss + penalty * torch.tanh(SATURATION * active * norms).sum(dim=(0, 2)).mean()
    return {"loss": loss, "error": error, "l0": (active > 0).sum(dim=-1).float().mean()}
