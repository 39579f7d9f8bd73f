"""Train a cross-layer transcoder (CLT) on a store's `mlp_in` and `mlp_out`, and save it as circuit-tracer loads it.

Every layer's MLP input is encoded into sparse features, and each feature writes to the MLP outputs of its own layer
and of all later ones (Ameisen et al. 2025, "Circuit Tracing", transformer-circuits.pub/2025/attribution-graphs):

    scripts/demo && python scripts/train_clt.py --store demo-acts --out clt

The same command again goes on where the last checkpoint stopped, with the very losses of a run that was never
stopped (on the same machine, device and number of threads). `--out` then holds

    W_enc_<l>.safetensors, W_dec_<l>.safetensors, config.yaml   for circuit-tracer: `load_clt(out, "mlp.hook_in")`
    log.jsonl           the losses of every step
    checkpoint.pt       weights, optimiser, feed, random state and settings, replaced atomically; ends on its CRC-32C
    evaluation.json     measured on held-out sequences, with the saved weights
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click
import torch
from crc32c import crc32c
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save

import mmcache
from mmcache.draft import publish, remove_drafts
from mmcache.files import make_folder
from mmcache.terminal import draw_rows

if TYPE_CHECKING:
    from io import FileIO

READS, WRITES = "mlp_in", "mlp_out"
CHECKPOINT = "checkpoint.pt"
BANDWIDTH, FIRST_THRESHOLD = 1.0, 0.1  # of JumpReLU, where rows have the norm sqrt(d_model)
SATURATION = 4.0  # of the sparsity penalty: Anthropic's c
REVIVAL = 1e-5  # weight of the pre-activation penalty
MEMORY = 0.95  # how much of the old cutoff a batch leaves, with TopK


class JumpReLU(torch.autograd.Function):
    """The input where it is over its threshold, else 0; the threshold gets a gradient although the step has none.

    Straight-through estimator of Rajamanoharan et al. 2024 (arXiv:2407.14435): a rectangle of width `BANDWIDTH` around
    the threshold stands for the step's derivative, d/dthreshold = -threshold / width inside it. The threshold is
    trained directly, as SAELens and dictionary_learning do: under Adam, its logarithm hardly moves.
    """

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        """Give `value * (value > threshold)`; both have the same shape."""
        ctx.save_for_backward(value, threshold)
        return value * (value > threshold)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the gradients of the value (exact off the step) and of the threshold (the estimate)."""
        value, threshold = ctx.saved_tensors
        near = (value - threshold).abs() < BANDWIDTH / 2
        return upstream[0] * (value > threshold), -upstream[0] * near * threshold / BANDWIDTH


class CrossLayerTranscoder(torch.nn.Module):
    """An encoder a layer, and for each layer's features decoders to it and to every later one.

    Args:
        n_layers, d_model, features: sizes; `features` is a layer.
        k: None for JumpReLU with a learnt threshold a feature. A number for TopK: in each layer, the `k * batch`
            features of a batch that write most (activation times decoder norm) are active, k a token on average.
            Off training the mean of what the last of them wrote is the threshold instead (BatchTopK, Bussmann et al.
            2024, arXiv:2412.06410), so that what is active no longer depends on the batch, and can be saved.
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
        """Give the norm of all that each feature writes: `[n_layers, features]`."""
        return torch.stack([decoder.flatten(1).norm(dim=1) for decoder in self.W_dec])

    def thresholds(self) -> torch.Tensor:
        """Give what a pre-activation has to exceed: `[n_layers, features]`."""
        return self.threshold.relu() if self.k is None else self.cutoff[:, None] / self.norms().detach()

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give pre-activations and activations, `[n_layers, batch, features]`, of `[batch, n_layers, d_model]`."""
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
        """Give what the features of `[n_layers, batch, features]` write: `[batch, n_layers, d_model]`."""
        written = self.b_dec.expand(active.shape[1], *self.b_dec.shape).clone()
        for layer, decoder in enumerate(self.W_dec):
            written[:, layer:] += (active[layer] @ decoder.flatten(1)).unflatten(1, decoder.shape[1:])
        return written

    @torch.no_grad()
    def folded(self, read_scale: torch.Tensor, write_scale: torch.Tensor) -> CrossLayerTranscoder:
        """Give the JumpReLU transcoder that does to raw rows what this one does to scaled ones.

        Args:
            read_scale: `[n_layers, d_model]`, what raw inputs were multiplied with.
            write_scale: the same, of the outputs.
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
    """Give the loss, its error part, and how many features of a layer are active a token.

    The error is the mean square over d_model, summed over layers. JumpReLU adds the sparsity penalty of Ameisen et
    al., tanh(c * activation * decoder norm); both add the pre-activation penalty, which pulls features that are never
    active back to their thresholds (Anthropic, "Circuits Updates - January 2025").
    """
    before, active = clt.encode(reads)
    norms = clt.norms()[:, None]
    error = (clt.decode(active) - writes).square().mean(dim=-1).sum(dim=-1).mean()
    loss = error + REVIVAL * ((clt.thresholds()[:, None] - before).relu() * norms).sum(dim=(0, 2)).mean()
    if clt.k is None:
        loss = loss + penalty * torch.tanh(SATURATION * active * norms).sum(dim=(0, 2)).mean()
    return {"loss": loss, "error": error, "l0": (active > 0).sum(dim=-1).float().mean()}


@torch.no_grad()
def evaluate(clt: CrossLayerTranscoder, data: mmcache.ActivationDataset) -> dict[str, Any]:
    """Measure a transcoder of raw rows on all of `data`.

    Explained variance is 1 - sum((y - predicted)^2) / sum((y - mean(y))^2) a layer, over all tokens and dimensions,
    where the mean is that of the very tokens measured; L0 is how many features are active a token; a dead feature is
    active on none of them.
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
    """Write a JumpReLU transcoder of raw rows in circuit-tracer's layout; files are numbered by place, not by layer."""
    for place, decoder in enumerate(clt.W_dec):
        encoder = {"W_enc": clt.W_enc, "b_enc": clt.b_enc, "b_dec": clt.b_dec, "threshold": clt.thresholds()}
        named = {f"{name}_{place}": value.detach()[place].contiguous() for name, value in encoder.items()}
        publish(out / f"W_enc_{place}.safetensors", save(named))
        publish(out / f"W_dec_{place}.safetensors", save({f"W_dec_{place}": decoder.detach()}))
    said = {
        "model_name": store.source.get("record", {}).get("name") or "unknown",
        "model_kind": "cross_layer_transcoder",
        # TransformerLens's names for the MLP's own input, and for what is added to the residual stream.
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "layers": list(store.layers),
    }
    publish(out / "config.yaml", "".join(f"{key}: {json.dumps(value)}\n" for key, value in said.items()).encode())


class Run:
    """A training run: what it trains, on what, how far it is, and the folder that it keeps itself in.

    Raises:
        ArgumentError, ShapeError: the options or the store's sites do not make a transcoder.
    """

    log: FileIO  # open while it trains

    def __init__(self, data: mmcache.ActivationDataset, options: SimpleNamespace) -> None:
        self.data, self.options, self.out = data, options, options.out
        sites = [data.store[site] for site in (READS, WRITES)]
        n_layers, _, d_model = sites[0].shape
        features = options.features or 8 * d_model
        topk = options.activation == "topk"
        if sites[1].shape[2] != d_model:
            raise mmcache.ShapeError(f"{READS} is {d_model} wide, and {WRITES} {sites[1].shape[2]}: expected the same")
        if topk and options.k > features:
            raise mmcache.ArgumentError(f"--k is {options.k}: a layer has {features} features")
        torch.manual_seed(options.seed)
        # Drawn on the CPU, so that a seed gives the same weights on every device.
        clt = CrossLayerTranscoder(n_layers, d_model, features, options.k if topk else None)
        self.clt = clt.to(options.device)
        self.optimizer = torch.optim.AdamW(self.clt.parameters(), lr=options.lr, weight_decay=0.0, fused=True)
        self.step, self.steps = 0, options.steps or options.epochs * len(data)
        reads, writes = (site.statistics for site in sites)
        # Inputs get the norm sqrt(d_model). Outputs get the variance 1 whatever their mean, so that all layers count
        # alike, and a layer's error is the part of its variance that is not explained.
        deviation = writes.std.square().mean(dim=1, keepdim=True).sqrt()
        self.scales = [
            scale.to(self.clt.b_dec) for scale in (reads.normalizer("scalar")[1], (1 / deviation).expand_as(writes.std))
        ]
        said = [part.numpy().tobytes() for found in (reads, writes) for part in (found.mean, found.std)]
        # All that the losses depend on; which tokens there are, and in which order, the feed's own state has too.
        self.settings = {
            "store": hashlib.sha256(b"".join(said)).hexdigest(),
            "features": features,
            "steps": self.steps,
            **{name: getattr(options, name) for name in ("activation", "batch_size", "lr", "seed")},
            "k" if topk else "sparsity": options.k if topk else options.sparsity,
        }

    def save(self) -> None:
        """Make the log durable up to here, then the state; a crash leaves the old checkpoint or the new one."""
        os.fsync(self.log.fileno())
        state = {
            "settings": self.settings,
            "step": self.step,
            "log": os.fstat(self.log.fileno()).st_size,
            "clt": self.clt.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "feed": self.data.state_dict(),
            "random": torch.get_rng_state(),
        }
        torch.save(state, file := io.BytesIO())
        publish(self.out / CHECKPOINT, file.getvalue() + crc32c(file.getvalue()).to_bytes(4, "big"))

    def load(self) -> None:
        """Go on from the checkpoint, if there is one; the log loses what came after it.

        Raises:
            PlanMismatchError: it was made with other settings.
            CorruptError: it is damaged, or the log is not the one it was made with.
        """
        path = self.out / CHECKPOINT
        if not path.exists():
            self.log.truncate(0)
            return
        data = path.read_bytes()
        if len(data) <= 4 or crc32c(data[:-4]) != int.from_bytes(data[-4:], "big"):
            raise mmcache.CorruptError(f"{path} is damaged: remove it to begin anew")
        there = torch.load(io.BytesIO(data[:-4]), map_location="cpu", weights_only=True)
        pairs = [(name, there["settings"].get(name), now) for name, now in self.settings.items()]
        differ = [f"{name} was {then}, and is {now}" for name, then, now in pairs if then != now]
        if differ:
            raise mmcache.PlanMismatchError(f"{path} is of another run: {'; '.join(differ)}. Take another --out")
        if os.fstat(self.log.fileno()).st_size < there["log"]:
            raise mmcache.CorruptError(f"{self.log.name} is shorter than at {path}: remove that to begin anew")
        self.clt.load_state_dict(there["clt"])
        self.optimizer.load_state_dict(there["optimizer"])
        self.data.load_state_dict(there["feed"])
        torch.set_rng_state(there["random"])
        self.step = there["step"]
        self.log.truncate(there["log"])

    def take(self, batch: mmcache.Batch) -> dict[str, float]:
        """Take one step, and give what it is logged with."""
        # Warm-up over the first tenth, decay over the last fifth, the penalty rising all the way (Anthropic, as above).
        share = min(1.0, (self.step + 1) / (0.1 * self.steps), (self.steps - self.step) / (0.2 * self.steps))
        self.optimizer.param_groups[0]["lr"] = self.options.lr * share
        reads, writes = (batch[site] * scale for site, scale in zip((READS, WRITES), self.scales, strict=True))
        if self.step == 0:
            self.clt.b_dec.data.copy_(writes.mean(dim=0))
        penalty = self.options.sparsity * (self.step + 1) / self.steps
        found = losses(self.clt, reads, writes, penalty)
        self.optimizer.zero_grad()
        found["loss"].backward()
        self.optimizer.step()
        self.step += 1
        numbers = torch.stack([value.detach() for value in found.values()]).tolist()
        if not all(map(math.isfinite, numbers)):
            raise mmcache.NonFiniteError(
                f"the loss of step {self.step} is {numbers[0]}: see `mmcache stats {self.data.store.path}` for values "
                f"that are not finite or that never vary, or take a lower --lr and another --out"
            )
        return {"step": self.step, **dict(zip(found, numbers, strict=True))}

    def train(self, console: Console) -> None:
        """Take all steps that are left, with checkpoints; the first of them says the settings, before any step.

        Raises:
            LockedError: another run has the folder.
        """
        make_folder(self.out)
        with (self.out / "log.jsonl").open("ab", buffering=0) as self.log, Progress(console=console) as bar:
            try:
                fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise mmcache.LockedError(f"another run is writing to {self.out}: take another --out") from error
            remove_drafts(self.out)
            self.load()
            self.save()
            task = bar.add_task("", total=self.steps, completed=self.step)
            while self.step < self.steps:
                for batch in itertools.islice(self.data, self.steps - self.step):
                    taken = self.take(batch)
                    self.log.write(json.dumps(taken).encode() + b"\n")
                    bar.update(task, completed=self.step)
                    if self.step % max(1, self.steps // 20) == 0:
                        bar.print("  ".join(f"{name} {value:.6g}" for name, value in taken.items()))
                    if self.step % self.options.checkpoint_every == 0 or self.step == self.steps:
                        self.save()


def feed(store: mmcache.Store, options: SimpleNamespace, **more: Any) -> mmcache.ActivationDataset:
    """Give the feed of both sites in float32."""
    sites, dtype = (READS, WRITES), torch.float32
    return mmcache.ActivationDataset(
        store, sites=sites, batch_size=options.batch_size, device=options.device, dtype=dtype, **more
    )


def feeds(
    store: mmcache.Store, options: SimpleNamespace
) -> tuple[mmcache.ActivationDataset, mmcache.ActivationDataset | None]:
    """Give the feed to train on, and that of the held-out sequences; None where there are too few to hold one out."""
    try:
        train = feed(store, options, split="train", seed=options.seed)
        return train, feed(store, options, split="validation", shuffle=None)
    except mmcache.ArgumentError as error:
        # Anything else that is wrong is raised again here.
        whole = feed(store, options, seed=options.seed)
        print(f"train_clt: training on everything, and measuring nothing: {error}", file=sys.stderr)
        return whole, None


def finish(run: Run, held_out: mmcache.ActivationDataset | None) -> None:
    """Save the weights; measure them, as they are saved, on what was held out, and print that."""
    store = run.data.store
    raw = run.clt.folded(*run.scales)
    save_clt(raw, run.out, store)
    if held_out is None:
        return
    found = evaluate(raw, held_out)
    publish(run.out / "evaluation.json", json.dumps(found, indent=2).encode())
    rows = [
        {"layer": layer} | {name: found[name][place] for name in ("explained_variance", "l0", "dead")}
        for place, layer in enumerate(store.layers)
    ]
    mean = f"mean explained variance {found['mean_explained_variance']:.4f}"
    draw_rows(Console(), f"{found['tokens']:,} held-out tokens: {mean}", rows)


_COUNT, _AMOUNT = click.IntRange(1), click.FloatRange(0)


# Every paragraph of the help as it is written, not wrapped anew.
@click.command(help=str(__doc__).replace("\n\n", "\n\n\b\n"), context_settings={"show_default": True})
@click.option("--store", required=True, type=click.Path(path_type=Path), help="A store with mlp_in and mlp_out.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; a run there goes on.")
@click.option("--features", type=_COUNT, help="Features a layer.  [8 * d_model]")
@click.option("--activation", type=click.Choice(["jumprelu", "topk"]), default="jumprelu")
@click.option("--k", type=_COUNT, default=16, help="topk: active features of each layer, a token on average.")
@click.option("--sparsity", type=_AMOUNT, default=4e-3, help="jumprelu: weight of the sparsity penalty.")
@click.option("--epochs", type=_COUNT, default=2, help="How often each token is seen.")
@click.option("--steps", type=_COUNT, help="Steps to take, instead of epochs.")
@click.option("--batch-size", type=_COUNT, default=1024, help="Tokens a step.")
@click.option("--lr", type=_AMOUNT, default=1e-3, help="Highest learning rate.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the weights and the order.")
@click.option("--device", default="cpu")
@click.option("--checkpoint-every", type=_COUNT, default=200, help="Steps.")
def main(**given: Any) -> None:
    """Train, save and measure."""
    options = SimpleNamespace(**given)
    try:
        data, held_out = feeds(mmcache.open(options.store), options)
        run = Run(data, options)
        run.train(Console(stderr=True))
        finish(run, held_out)
    except (mmcache.MmcacheError, OSError) as error:
        print(f"train_clt: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
