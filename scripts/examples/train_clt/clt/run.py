"""A training run: steps, on one process or several, and checkpoints from which it resumes exactly."""

from __future__ import annotations

import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import stat
from typing import TYPE_CHECKING, Any

import torch
from crc32c import crc32c
from rich.progress import Progress

import mmcache
from clt.files import publish, remove_temporary
from clt.outcome import READS, WRITES
from clt.transcoder import CrossLayerTranscoder, losses

if TYPE_CHECKING:
    from io import FileIO
    from types import SimpleNamespace

    from rich.console import Console

    from clt.ranks import Ranks

__all__ = ["Run"]

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
# More than the bytes of a step's line in the log.
_LINE = 4096


class Run:
    """A training run: the transcoder, its data, its progress and its folder.

    A step has the same tokens on any number of ranks: each rank takes its share, and all apply the gradients of the
    mean. Only the first rank writes to the folder.

    Raises:
        ArgumentError, ShapeError: the options or the store's sites do not fit a transcoder.
    """

    log: FileIO  # open while it trains

    def __init__(self, data: mmcache.ActivationDataset, options: SimpleNamespace, ranks: Ranks) -> None:
        self.data, self.options, self.out, self.ranks = data, options, options.out, ranks
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
        self.clt = clt.to(ranks.device)
        self.optimizer = torch.optim.AdamW(self.clt.parameters(), lr=options.lr, weight_decay=0.0, fused=True)
        self.step, self.steps = 0, options.steps or options.epochs * len(data)
        reads, writes = (site.statistics for site in sites)
        # Inputs are scaled to the norm sqrt(d_model). Outputs are scaled to the variance 1 whatever their mean, so that
        # all layers have the same weight, and a layer's error is its share of unexplained variance.
        deviation = writes.std.square().mean(dim=1, keepdim=True).sqrt()
        self.scales = [
            scale.to(self.clt.b_dec) for scale in (reads.normalizer("scalar")[1], (1 / deviation).expand_as(writes.std))
        ]
        said = [part.numpy().tobytes() for found in (reads, writes) for part in (found.mean, found.std)]
        # All that the losses depend on; the feed's own state also has the tokens and their order.
        self.settings = {
            "store": hashlib.sha256(b"".join(said)).hexdigest(),
            "features": features,
            "steps": self.steps,
            **{name: getattr(options, name) for name in ("activation", "batch_size", "lr", "seed")},
            "k" if topk else "sparsity": options.k if topk else options.sparsity,
        }

    def save(self) -> bytes:
        """Sync the log, then publish the state and return its bytes; a crash leaves the old or the new checkpoint.

        Only the first rank does this, since all have the same state; the others return no bytes.
        """
        if self.ranks.rank:
            return b""
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
        publish(self.out, CHECKPOINT, file.getvalue() + crc32c(file.getvalue()).to_bytes(4, "big"))
        return file.getvalue()

    def load(self) -> None:
        """Resume from the checkpoint, if there is one; the log loses the steps after it, which are run again.

        Raises:
            PlanMismatchError: as `restore`.
            CorruptError: the checkpoint is damaged, or was made with another log.
        """
        path = self.out / CHECKPOINT
        if not path.exists():
            return
        data = path.read_bytes()
        if len(data) <= 4 or crc32c(data[:-4]) != int.from_bytes(data[-4:], "big"):
            raise mmcache.CorruptError(f"{path} is damaged, or not of this script: take another --out")
        there = self.restore(data[:-4])
        self._shorten_log(there["log"], there["step"])

    def _shorten_log(self, size: int, step: int) -> None:
        """Cut the log back to its size at a step; other content than steps of this run is kept in another file.

        Raises:
            CorruptError: the log is not this run's: no line of that step ends at that size.
        """
        path = self.out / LOG
        with path.open("rb") as file:
            file.seek(max(0, size - _LINE))
            before = file.read(size - file.tell())
            after = file.read()
        if os.fstat(self.log.fileno()).st_size < size or (size and _steps(before[-_LINE:])[-1:] != [step]):
            raise mmcache.CorruptError(f"{path} is not the log that {CHECKPOINT} was made with: take another --out")
        whole, _, torn = after.rpartition(b"\n")
        steps = _steps(whole)
        if steps != list(range(step + 1, step + 1 + len(steps))) or not b'{"step": '.startswith(torn[:9]):
            publish(self.out, f"log-behind-step-{step}.jsonl", after)
        self.log.truncate(size)

    def restore(self, data: bytes) -> dict[str, Any]:
        """Load a state, and return it.

        Raises:
            PlanMismatchError: it was made with other settings.
        """
        there: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        pairs = [(name, there["settings"].get(name), now) for name, now in self.settings.items()]
        differ = [f"{name} was {then}, and is {now}" for name, then, now in pairs if then != now]
        if differ:
            path = self.out / CHECKPOINT
            raise mmcache.PlanMismatchError(f"{path} is of another run: {'; '.join(differ)}. Take another --out")
        self.clt.load_state_dict(there["clt"])
        self.optimizer.load_state_dict(there["optimizer"])
        self.data.load_state_dict(there["feed"])
        torch.set_rng_state(there["random"])
        self.step = there["step"]
        return there

    def gradients(self, reads: torch.Tensor, writes: torch.Tensor, penalty: float) -> dict[str, torch.Tensor]:
        """Compute the gradients of the step's loss into the parameters. Returns the loss and its parts.

        With several ranks, they are those of the mean over all ranks' tokens; at the end of an epoch a rank may have no
        tokens. Under TopK each rank chooses among its own tokens, and the cutoff is the mean of theirs.
        """
        self.optimizer.zero_grad()
        names, mine = ("loss", "error", "l0"), len(reads)
        if self.ranks.count == 1:
            found = losses(self.clt, reads, writes, penalty)
            found["loss"].backward()
            return {name: found[name].detach() for name in names}
        zero = torch.zeros((), device=reads.device)
        found = losses(self.clt, reads, writes, penalty) if mine else dict.fromkeys(names, zero)
        numbers = torch.stack([*(found[name].detach() for name in names), zero + 1]).double() * mine
        *parts, total = self.ranks.sum(numbers)
        if mine:
            (found["loss"] * (mine / total)).backward()
        for parameter in self.clt.parameters():
            parameter.grad = self.ranks.sum(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        if self.clt.k is not None:
            self.clt.cutoff.copy_(self.ranks.sum(self.clt.cutoff * (mine / total)))
        return {name: part / total for name, part in zip(names, parts, strict=True)}

    def take(self, batch: mmcache.Batch) -> dict[str, float]:
        """Run one step. Returns its entry in the log."""
        # Warm-up over the first tenth, decay over the last fifth, and a penalty that rises throughout (Anthropic, as
        # above).
        share = min(1.0, (self.step + 1) / (0.1 * self.steps), (self.steps - self.step) / (0.2 * self.steps))
        self.optimizer.param_groups[0]["lr"] = self.options.lr * share
        reads, writes = (batch[site] * scale for site, scale in zip((READS, WRITES), self.scales, strict=True))
        if self.step == 0:
            self.clt.b_dec.data.copy_(self._mean(writes))
        penalty = self.options.sparsity * (self.step + 1) / self.steps
        found = self.gradients(reads, writes, penalty)
        self.optimizer.step()
        self.step += 1
        numbers = torch.stack(list(found.values())).tolist()
        if not all(map(math.isfinite, numbers)):
            raise mmcache.NonFiniteError(
                f"the loss of step {self.step} is {numbers[0]}: see `mmcache stats {self.data.store.path}` for values "
                f"that are not finite or that never vary, or take a lower --lr and another --out"
            )
        return {"step": self.step, **dict(zip(found, numbers, strict=True))}

    def _mean(self, rows: torch.Tensor) -> torch.Tensor:
        """The mean of the rows of all ranks."""
        if self.ranks.count == 1:
            return rows.mean(dim=0)
        return self.ranks.sum(rows.sum(dim=0)) / self.ranks.sum(torch.tensor(float(len(rows)), device=rows.device))

    def _check_out(self) -> None:
        """Refuse a folder that holds anything but a run, so that no other file is overwritten.

        A run that was killed before its first checkpoint leaves an empty log, and a temporary file of the checkpoint.

        Raises:
            StoreExistsError: the folder holds something else.
        """
        if (self.out / CHECKPOINT).exists():
            return
        for path in sorted(self.out.iterdir()):
            empty_log = path.name == LOG and path.is_file() and not path.stat().st_size
            if not empty_log and not (path.name.startswith(f".{CHECKPOINT}.") and path.suffix == ".tmp"):
                raise mmcache.StoreExistsError(
                    f"{self.out} holds {path.name}, and no {CHECKPOINT} of a run: take another --out, or move that away"
                )

    def _open_log(self) -> FileIO:
        """The log, opened to append: a regular file in this folder, never a link; for other ranks, /dev/null.

        Raises:
            StoreExistsError: something else is there.
        """
        if self.ranks.rank:
            fd = os.open(os.devnull, os.O_WRONLY)
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            self._check_out()
            fd = os.open(self.out / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        log = open(fd, "ab", buffering=0)  # noqa: PTH123, SIM115 -- a descriptor, which `train` closes
        status = os.fstat(fd)
        if not self.ranks.rank and (not stat.S_ISREG(status.st_mode) or status.st_nlink > 1):
            log.close()
            raise mmcache.StoreExistsError(f"{self.out / LOG} is no file, or has other names too: take another --out")
        return log

    def _begin(self) -> None:
        """Resume from the checkpoint, and write one, so that the settings are saved before any step.

        Raises:
            LockedError: another run has the folder.
        """
        if not self.ranks.rank:
            try:
                fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise mmcache.LockedError(f"another run is writing to {self.out}: take another --out") from error
            # Check again under the lock: another run may have changed the folder.
            self._check_out()
            remove_temporary(self.out, CHECKPOINT)
            self.load()
        state = self.save()
        if self.ranks.count > 1:
            # Sent from the first rank's memory: a shared folder may show each machine something else.
            state = self.ranks.spread(state)
            if self.ranks.rank:
                self.restore(state)

    def train(self, console: Console) -> None:
        """Run all remaining steps, with checkpoints; the first checkpoint, before any step, holds the settings.

        Raises:
            LockedError: another run has the folder.
            StoreExistsError: something else is in it.
        """
        with self._open_log() as self.log, Progress(console=console) as bar:
            self._begin()
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


def _steps(lines: bytes) -> list[Any]:
    """The step numbers of log lines; None for anything else."""
    return [_step(line) for line in lines.splitlines()]


def _step(line: bytes) -> Any:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
