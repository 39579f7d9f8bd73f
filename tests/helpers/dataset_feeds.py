"""Stores for the tests of the training feed, and what a batch of one should hold."""

import hashlib

import numpy as np
import pytest
import torch

import mmcache
from stores_and_processes import raw, same, without_sync

SITES = {"wide": 48, "narrow": 8}
LAYERS = 3
# Of 336 bytes a token: blocks of four tokens, ten a pool, at most.
SMALL = LAYERS * 56 * 2 * 40


def make_store(path, lengths, *, dtype=torch.bfloat16, layout="token", sites=None, seed=0, specials=0.1, **options):
    """Make a store of sequences of these lengths: each begins with BOS (0), and some tokens are special (1)."""
    sites = SITES if sites is None else sites
    generator = torch.Generator().manual_seed(seed)
    with mmcache.create(
        path, sites=sites, n_layers=LAYERS, dtype=dtype, layout=layout, special_tokens=[0, 1], **options
    ) as writer:
        for length in lengths:
            tokens = torch.randint(2, 90, (length,), generator=generator)
            tokens[torch.rand(length, generator=generator) < specials] = 1
            tokens[0] = 0
            rows = {site: torch.randn(LAYERS, length, width, generator=generator) for site, width in sites.items()}
            flags = torch.randint(0, 2, (length,), generator=generator, dtype=torch.uint8) * 8
            writer.append(tokens, rows, flags=flags)
    return mmcache.open(path)


def make_shared(folder):
    """Make the store that a module's tests share."""
    with pytest.MonkeyPatch.context() as patch:
        without_sync(patch)
        return make_store(folder / "acts", [5, 1, 300, 77, 2, 41, 500, 83])


def check(batch, store, *, layers=None, sites=None):
    """Check that a batch holds the store's rows of its positions, bit for bit, in every site."""
    assert list(batch) == list(store.sites if sites is None else sites)
    for site, rows in batch.items():
        assert same(rows, store[site].gather(batch.positions, layers=layers)), site
    assert batch.positions.dtype == torch.int64
    assert same(batch.tokens, store.tokens[batch.positions])


def positions(batches):
    """Give the positions of some batches, in order."""
    return np.concatenate([np.empty(0, np.int64), *(batch.positions.numpy() for batch in batches)]).tolist()


def fingerprint(batch):
    """Give a hash of everything in a batch but its state."""
    digest = hashlib.sha256(raw(batch.positions) + raw(batch.tokens))
    for site, rows in batch.items():
        digest.update(f"{site} {tuple(rows.shape)} {rows.dtype}".encode() + raw(rows))
    return digest.hexdigest()[:16]
