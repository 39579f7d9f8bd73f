"""What the tests of the transcoder's trainer share: a store that can be learnt, the script's parts, and running it."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from click.testing import CliRunner

import mmcache

SCRIPT = Path(__file__).parents[2] / "scripts" / "examples" / "train_clt" / "train_clt.py"
LAYERS, WIDTH = 3, 8
SMALL = {"features": 24, "batch-size": 64, "k": 4, "steps": 40, "checkpoint-every": 7}


def load_script():
    """Give what the script is made of, and its modules."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        names = ("train_clt", "clt.run", "clt.outcome", "clt.transcoder", "clt.ranks")
        main, steps, outcome, transcoder, ranks = map(importlib.import_module, names)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    publishers = [main, steps, outcome]
    return SimpleNamespace(
        main=main.main,
        feeds=main.feeds,
        Run=steps.Run,
        steps=steps,
        publishers=publishers,
        clt=transcoder,
        ranks=ranks,
    )


def make_store(path, lengths=(40,) * 60, *, sites=("mlp_in", "mlp_out"), widths=(WIDTH, WIDTH), **options):
    """Make a store whose MLPs are some: a layer's output is a function of its own input, and neither is normalised."""
    generator = torch.Generator().manual_seed(0)
    mlps = [
        [torch.randn(size, generator=generator) / 3 for size in ((widths[0], 8), (8, widths[1]))] for _ in range(LAYERS)
    ]
    scale = torch.tensor([9, 1, 0.1])[:, None, None]
    with mmcache.create(
        path, sites=dict(zip(sites, widths, strict=True)), n_layers=LAYERS, special_tokens=[0], **options
    ) as writer:
        for length in lengths:
            tokens = torch.randint(1, 90, (length,), generator=generator)
            tokens[0] = 0
            reads = torch.randn(LAYERS, length, widths[0], generator=generator) * scale
            writes = [(rows @ into).relu() @ out + 3 for rows, (into, out) in zip(reads, mlps, strict=True)]
            writer.append(tokens, dict(zip(sites, (reads, torch.stack(writes)), strict=True)))
    return mmcache.open(path)


def command(store, out, **options):
    named = {"store": getattr(store, "path", store), "out": out} | SMALL | options
    return [word for name, value in named.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def run(script, store, out, **options):
    """Run the script in this process."""
    done = CliRunner().invoke(script.main, command(store, out, **options))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def files(out):
    """Give what a run leaves, but for the checkpoint, which is zipped; nothing half-written may be there."""
    found = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "checkpoint.pt"}
    layers = [f"W_{part}_{layer}.safetensors" for part in ("dec", "enc") for layer in range(LAYERS)]
    assert sorted(found) == [*layers, "config.yaml", "evaluation.json", "log.jsonl"]
    return found


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
