"""Stores of every kind, small enough to be damaged thousands of times, and ways to damage them."""

import os
import random

import torch

import mmcache
import small_models

TEXTS = [f"text number {number}, " + "and so on " * (number % 5) for number in range(9)]


def extracted(path, texts=TEXTS, **options):
    """Make a planned store, complete, of several shards a site."""
    given = {"sites": ("mlp_in", "mlp_out"), "context_length": 24, "batch_size": 3, "shard_tokens": 64} | options
    return mmcache.extract(small_models.llama(), small_models.byte_tokenizer(), texts, path, **given)


def grown(path, layout="token", *, special=(3,), seed=0):
    """Make a grown store with a partly filled last shard, and a crash's leftovers behind the commit."""
    torch.manual_seed(seed)
    with mmcache.create(
        path, sites={"a": 8, "b": 4}, n_layers=2, layout=layout, shard_tokens=256, special_tokens=special,
        dtype=torch.float32, metadata={"note": "a store of the user's"},
    ) as writer:  # fmt: skip
        for length in (100, 300, 200):
            writer.append(
                torch.randint(0, 9, (length,)), {"a": torch.randn(2, length, 8), "b": torch.randn(2, length, 4)}
            )
            writer.commit()
    return mmcache.open(path)


def cache(path):
    """Make a cache of three layers."""
    torch.manual_seed(0)
    with mmcache.FullActivationCache.with_capacity(3, path, shard_tokens=256) as made:
        for _ in range(3):
            made.push(torch.randn(700, 16))
    return mmcache.open(path)


MAKERS = {
    "planned, token": extracted,
    "planned, layer": lambda path: extracted(path, layout="layer"),
    "grown, token": grown,
    "grown, layer": lambda path: grown(path, "layer"),
    "cache": cache,
}


def files_of(path):
    """List every file of a store."""
    return sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))


class Damaged:
    """Damages files of a store, one at a time, and puts them right again."""

    def __init__(self, path, seed):
        self.path, self.random = path, random.Random(seed)  # noqa: S311 -- to damage files
        self.files = files_of(path)
        self.sizes = [file.stat().st_size for file in self.files]

    def any_file(self, *, by_size=True):
        """Choose a file, large ones more often, or each as often as the others."""
        weights = self.sizes if by_size and self.random.random() < 0.5 else None
        return self.random.choices(self.files, weights)[0]

    def flip(self, data):
        """Flip one bit, anywhere."""
        bit = self.random.randrange(len(data) * 8)
        data = bytearray(data)
        data[bit // 8] ^= 1 << bit % 8
        return bytes(data), bit

    def resize(self, data):
        """Cut bytes off, by any amount, or put some behind: zeros, or random ones."""
        amount = self.random.choice((1, 2, 8, 512, 4096, self.random.randrange(1, len(data) + 1)))
        if self.random.random() < 0.5:
            return data[: max(0, len(data) - amount)]
        return data + (bytes(amount) if self.random.random() < 0.5 else os.urandom(amount))
