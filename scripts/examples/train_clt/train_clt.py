"""Train a cross-layer transcoder (CLT) on a store's `mlp_in` and `mlp_out`, and save it as circuit-tracer loads it.

Every layer's MLP input is encoded into sparse features, and each feature writes to the MLP outputs of its own layer
and of all later ones (Ameisen et al. 2025, "Circuit Tracing", transformer-circuits.pub/2025/attribution-graphs):

    scripts/demo && python scripts/examples/train_clt/train_clt.py --store demo-acts --out clt

Run the same command to resume from the last checkpoint. The losses are exactly those of an uninterrupted run (on the
same machine, device, number of threads and number of ranks). Several ranks, on one machine or more, share each batch;
their loss equals that of one rank up to rounding. A run may resume with another number of ranks:

    torchrun --nproc-per-node=2 scripts/examples/train_clt/train_clt.py --store demo-acts --out clt

`--out` is a new folder, or that of an earlier run. It then holds

    W_enc_<l>.safetensors, W_dec_<l>.safetensors, config.yaml   for circuit-tracer: `load_clt(out, "mlp.hook_in")`
    log.jsonl           the losses of every step
    checkpoint.pt       weights, optimiser, feed, random state and settings, replaced atomically; ends with its CRC-32C
    evaluation.json     measured on held-out sequences, with the saved weights
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
from clt.files import publish
from clt.outcome import READS, WRITES, evaluate, save_clt
from clt.ranks import Ranks, together
from clt.run import Run
from rich.console import Console
from rich.table import Table

import mmcache


def feeds(
    store: mmcache.Store, options: SimpleNamespace, ranks: Ranks
) -> tuple[mmcache.ActivationDataset, mmcache.ActivationDataset | None]:
    """The feed to train on, and that of the held-out sequences; None for the latter if there are too few sequences.

    Both yield both sites in float32. The held-out feed is not shared among the ranks: only the first one evaluates.
    """
    if options.batch_size % ranks.count:
        raise mmcache.ArgumentError(f"--batch-size is {options.batch_size}: expected a multiple of {ranks.count} ranks")

    def feed(shuffle: Any, size: int, rank: int, count: int, **more: Any) -> mmcache.ActivationDataset:
        return mmcache.ActivationDataset(
            store,
            sites=(READS, WRITES),
            batch_size=size,
            shuffle=shuffle,
            device=ranks.device,
            dtype=torch.float32,
            rank=rank,
            world_size=count,
            **more,
        )

    share = options.shuffle, options.batch_size // ranks.count, ranks.rank, ranks.count
    try:
        train = feed(*share, split="train", seed=options.seed)
        return train, feed(None, options.batch_size, 0, 1, split="validation")
    except mmcache.ArgumentError as error:
        # Any other error is raised again here.
        whole = feed(*share, seed=options.seed)
        if not ranks.rank:
            print(f"train_clt: training on everything, and measuring nothing: {error}", file=sys.stderr)
        return whole, None


def finish(run: Run, held_out: mmcache.ActivationDataset | None) -> None:
    """Save the weights, then measure the saved weights on the held-out feed, and print the result."""
    store = run.data.store
    raw = run.clt.folded(*run.scales)
    save_clt(raw, run.out, store)
    if held_out is None:
        return
    found = evaluate(raw, held_out)
    publish(run.out, "evaluation.json", json.dumps(found, indent=2).encode())
    mean = f"mean explained variance {found['mean_explained_variance']:.4f}"
    table = Table("layer", "explained variance", "l0", "dead", title=f"{found['tokens']:,} held-out tokens: {mean}")
    for layer, variance, l0, dead in zip(
        store.layers, found["explained_variance"], found["l0"], found["dead"], strict=True
    ):
        table.add_row(str(layer), f"{variance:.4f}", f"{l0:.2f}", str(dead))
    Console().print(table)


_COUNT, _AMOUNT = click.IntRange(1), click.FloatRange(0)


# `\b` keeps click from wrapping the paragraphs of the help again.
@click.command(help=str(__doc__).replace("\n\n", "\n\n\b\n"), context_settings={"show_default": True})
@click.option("--store", required=True, type=click.Path(path_type=Path), help="A store with mlp_in and mlp_out.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder; or a run's, which goes on.")
@click.option("--features", type=_COUNT, help="Features a layer.  [8 * d_model]")
@click.option("--activation", type=click.Choice(["jumprelu", "topk"]), default="jumprelu")
@click.option("--k", type=_COUNT, default=16, help="topk: active features of each layer, a token on average.")
@click.option("--sparsity", type=_AMOUNT, default=4e-3, help="jumprelu: weight of the sparsity penalty.")
@click.option("--epochs", type=_COUNT, default=2, help="How often each token is seen.")
@click.option("--steps", type=_COUNT, help="Steps to take, instead of epochs.")
@click.option("--batch-size", type=_COUNT, default=1024, help="Tokens a step, over all ranks.")
@click.option("--shuffle", type=click.Choice(["global", "block"]), default="global", help="As of ActivationDataset.")
@click.option("--lr", type=_AMOUNT, default=1e-3, help="Highest learning rate.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the weights and the order.")
@click.option("--device", default="cpu")
@click.option("--checkpoint-every", type=_COUNT, default=200, help="Steps.")
def main(**given: Any) -> None:
    """Train, save and measure."""
    options = SimpleNamespace(**given)
    try:
        with together(options.device) as ranks:
            data, held_out = feeds(mmcache.open(options.store), options, ranks)
            run = Run(data, options, ranks)
            run.train(Console(stderr=True, quiet=ranks.rank > 0))
            if not ranks.rank:
                finish(run, held_out)
    except (mmcache.MmcacheError, OSError) as error:
        print(f"train_clt: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
