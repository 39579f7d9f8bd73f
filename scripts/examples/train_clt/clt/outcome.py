"""Evaluation of a trained transcoder, and the files that it is saved in."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save

from clt.files import publish

if TYPE_CHECKING:
    from pathlib import Path

    import mmcache
    from clt.transcoder import CrossLayerTranscoder

__all__ = ["READS", "WRITES", "evaluate", "save_clt"]

READS, WRITES = "mlp_in", "mlp_out"


@torch.no_grad()
def evaluate(clt: CrossLayerTranscoder, data: mmcache.ActivationDataset) -> dict[str, Any]:
    """Evaluate a transcoder of raw rows on all of `data`.

    Explained variance, per layer, is 1 - sum((y - predicted)^2) / sum((y - mean(y))^2), over all tokens and dimensions,
    with the mean of the tokens measured. L0 is the number of active features per token. A dead feature is active on
    none of the tokens.
    """
    clt.eval()
    n_layers, features = clt.b_enc.shape
    missed, squares = torch.zeros(2, n_layers, dtype=torch.float64, device=clt.b_enc.device)
    sums = torch.zeros_like(clt.b_dec, dtype=torch.float64)
    fired = torch.zeros(n_layers, features, dtype=torch.int64, device=clt.b_enc.device)
    count = 0
    for batch in data:
        active, wanted = clt.encode(batch[READS])[1], batch[WRITES].double()
        missed += (wanted - clt.decode(active)).square().sum(dim=(0, 2))
        squares += wanted.square().sum(dim=(0, 2))
        sums += wanted.sum(dim=0)
        fired += (active > 0).sum(dim=1)
        count += len(wanted)
    explained = 1 - missed / (squares - sums.square().sum(dim=1) / count)
    return {
        "tokens": count,
        "explained_variance": explained.tolist(),
        "mean_explained_variance": explained.mean().item(),
        "l0": (fired.sum(dim=1) / count).tolist(),
        "dead": (fired == 0).sum(dim=1).tolist(),
    }


def save_clt(clt: CrossLayerTranscoder, out: Path, store: mmcache.Store) -> None:
    """Write a JumpReLU transcoder of raw rows in circuit-tracer's layout; files are numbered by index, not by layer."""
    for place, decoder in enumerate(clt.W_dec):
        encoder = {"W_enc": clt.W_enc, "b_enc": clt.b_enc, "b_dec": clt.b_dec, "threshold": clt.thresholds()}
        named = {f"{name}_{place}": value.detach()[place].contiguous() for name, value in encoder.items()}
        publish(out, f"W_enc_{place}.safetensors", save(named))
        publish(out, f"W_dec_{place}.safetensors", save({f"W_dec_{place}": decoder.detach()}))
    said = {
        "model_name": store.source.get("record", {}).get("name") or "unknown",
        "model_kind": "cross_layer_transcoder",
        # TransformerLens's names for the MLP's own input, and for what is added to the residual stream.
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "layers": list(store.layers),
    }
    publish(out, "config.yaml", "".join(f"{key}: {json.dumps(value)}\n" for key, value in said.items()).encode())
