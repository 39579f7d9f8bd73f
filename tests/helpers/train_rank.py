"""Runs the trainer as one rank, or with "feed" the feed alone, and notes what the rank saw: see test_train_ranks.py."""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

import mmcache
from clt_trainer import load_script
from stores_and_processes import raw

RANK = os.environ["RANK"]


def bytes_read():
    """Count what this process asked files for, whether or not it came from memory."""
    return int(Path("/proc/self/io").read_text().split()[1])


def train(folder, arguments):
    """Train, and write down the steps' tokens with their epochs, and the weights; die before step $KILL, rank:step."""
    script, steps, runs = load_script(), [], []
    take, before = script.Run.take, bytes_read()

    def noted(self, batch):
        if os.environ.get("KILL") == f"{RANK}:{self.step}":
            os.kill(os.getpid(), signal.SIGKILL)
        found = take(self, batch)
        # Its state is behind the batch, which may be the last of its epoch.
        steps.append((batch.state["epoch"], batch.positions.tolist()))
        runs[:] = [self]
        return found

    script.Run.take = noted
    try:
        script.main(arguments)
    finally:
        weights = hashlib.sha256(b"".join(map(raw, runs[0].clt.state_dict().values()))) if runs else None
        note(folder, steps=steps, weights=weights and weights.hexdigest(), read=bytes_read() - before)


def feed(folder, path):
    """Take an epoch of blocks in step with the others."""
    torch.distributed.init_process_group("gloo")
    with mmcache.open(path) as store:
        size = sum(store[site].shape[0] * store[site].d_model for site in store.sites) * 2
        data = mmcache.ActivationDataset(store, batch_size=64, shuffle="block", buffer_bytes=1024 * size, drop=())
        before, seen = bytes_read(), []
        for batch in data:
            torch.distributed.all_reduce(torch.zeros(1))
            seen += batch.positions.tolist()
        note(
            folder, steps=[(0, seen)], read=bytes_read() - before, pools=len(data._plan.order(data._position).blocks(0))
        )
    torch.distributed.destroy_process_group()


def note(folder, **found):
    Path(folder, f"{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[2] == "feed":
        feed(sys.argv[1], sys.argv[3])
    else:
        train(sys.argv[1], sys.argv[2:])
