"""Whatever is done to a writer or a cache, in whatever order: the store agrees with a plain twin of tensors."""

import shutil
import tempfile
from pathlib import Path
from unittest import mock

import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import mmcache
from mmcache.write.token_columns import publish_columns
from stores_and_processes import Twin, abandon, random_bits, same

LENGTHS = st.one_of(st.integers(1, 5), st.sampled_from([63, 64, 65, 128, 150]))


class Folder(RuleBasedStateMachine):
    """A machine with a folder of its own, and without syncs, which only matter where the power fails."""

    def __init__(self):
        super().__init__()
        self.sync = mock.patch("os.fsync")
        self.sync.start()
        self.folder = Path(tempfile.mkdtemp(prefix="mmcache-test-"))
        self.path = self.folder / "acts"

    def teardown(self):
        self.end()
        self.sync.stop()
        shutil.rmtree(self.folder)

    def end(self):
        """Close what is open."""


class WriterMachine(Folder):
    """A store that is created, appended to, committed, closed, crashed, opened again, and read."""

    @initialize(
        layout=st.sampled_from(["layer", "token"]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        n_layers=st.integers(1, 3),
        shard_tokens=st.sampled_from([None, 2048]),
        widths=st.sampled_from([{"a": 32}, {"a": 16, "b": 32}, {"a": 7, "b": 1}]),
    )
    def create(self, layout, dtype, n_layers, shard_tokens, widths):
        # 64 rows of 64 bytes and more are whole pages: small shards, so that many edges are met.
        small = 16 in widths.values() or 32 in widths.values()
        self.twin = Twin(widths, n_layers, dtype, special=[0])
        self.writer = mmcache.create(
            self.path,
            sites=widths,
            n_layers=n_layers,
            dtype=dtype,
            layout=layout,
            shard_tokens=(128 if small else 2048) if shard_tokens else None,
            special_tokens=[0],
        )
        self.committed = self.twin.copy()
        self.seed = 0

    def random(self, *shape, dtype=None):
        self.seed += 1
        return {
            site: random_bits(self.twin.n_layers, *shape, width, dtype=dtype or self.twin.dtype, seed=self.seed)
            for site, width in self.twin.sites.items()
        }

    def ids(self, *shape):
        return torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(self.seed))

    @precondition(lambda self: self.writer is not None)
    @rule(length=LENGTHS, as_lists=st.booleans(), flagged=st.booleans())
    def append(self, length, as_lists, flagged):
        rows, tokens = self.random(length), self.ids(length)
        flags = (tokens * 8).tolist() if flagged else None
        given_rows = {site: list(values) for site, values in rows.items()} if as_lists else rows
        self.writer.append(tokens.tolist() if as_lists else tokens, given_rows, flags=flags)
        self.twin.append(tokens, rows, flags)

    @precondition(lambda self: self.writer is not None and self.twin.spans)
    @rule(length=LENGTHS)
    def go_on(self, length):
        rows, tokens = self.random(length), self.ids(length)
        self.writer.append(tokens, rows, continues=True)
        self.twin.append(tokens, rows, continues=True)

    @precondition(lambda self: self.writer is not None)
    @rule(batch=st.integers(1, 3), length=st.integers(1, 40), side=st.sampled_from(["none", "left", "right", "holes"]))
    def append_batch(self, batch, length, side):
        rows, tokens = self.random(batch, length), self.ids(batch, length)
        mask = torch.ones(batch, length, dtype=torch.bool)
        for row in range(batch):
            hidden = (self.seed + row) % length
            if side == "left":
                mask[row, :hidden] = False
            elif side == "right":
                mask[row, length - hidden :] = False
            elif side == "holes" and hidden:
                mask[row, hidden::2] = False
        self.writer.append(tokens, rows, None if side == "none" else mask)
        for row in range(batch):
            kept = {site: values[:, row][:, mask[row]] for site, values in rows.items()}
            self.twin.append(tokens[row][mask[row]], kept)

    @precondition(lambda self: self.writer is not None)
    @rule(length=st.integers(1, 10))
    def append_what_must_be_cast(self, length):
        self.seed += 1
        generator, tokens = torch.Generator().manual_seed(self.seed), self.ids(length)
        rows = {
            site: torch.randn(self.twin.n_layers, length, width, generator=generator, dtype=torch.float64)
            for site, width in self.twin.sites.items()
        }
        self.writer.append(tokens, rows)
        self.twin.append(tokens, rows)

    @precondition(lambda self: self.writer is not None)
    @rule()
    def append_what_does_not_fit(self):
        rows = self.random(3)
        for bad in ((torch.arange(4), rows), (torch.arange(3), {**rows, "other": rows["a"]})):
            try:
                self.writer.append(*bad)
            except mmcache.MmcacheError:
                continue
            raise AssertionError("it was taken")

    @precondition(lambda self: self.writer is not None)
    @rule()
    def commit(self):
        self.writer.commit()
        self.committed = self.twin.copy()

    @precondition(lambda self: self.writer is not None)
    @rule()
    def close(self):
        self.writer.close()
        self.committed = self.twin.copy()
        self.writer = None

    @precondition(lambda self: self.writer is not None)
    @rule(sealed=st.booleans())
    def crash(self, sealed):
        # With the last shard, and perhaps the small arrays, already there: they are ahead of the commit.
        if sealed and self.writer._block is not None:
            self.writer._block.seal(*self.writer._started())
            self.writer._block = None
            self.writer._pipeline.drain()
            for column in self.writer._columns.values():
                publish_columns(self.writer.path, [column])
        abandon(self.writer)
        self.writer = None
        self.twin = self.committed.copy()

    @precondition(lambda self: self.writer is None)
    @rule()
    def go_on_writing(self):
        self.writer = mmcache.append(self.path)
        assert (self.writer.n_tokens, self.writer.n_sequences) == (len(self.twin.tokens), len(self.twin.spans))

    @rule(data=st.data())
    def read(self, data):
        with mmcache.open(self.path) as store:
            self.committed.check(store)
            total = store.n_tokens
            if not total:
                return
            positions = data.draw(st.lists(st.integers(-total, total - 1), max_size=8))
            layers = data.draw(st.none() | st.lists(st.integers(0, self.twin.n_layers - 1), max_size=3))
            site = data.draw(st.sampled_from(sorted(self.twin.sites)))
            rows = self.committed.rows[site]
            picked = rows if layers is None else rows[layers]
            assert same(store[site].gather(positions, layers=layers), picked[:, positions].transpose(0, 1).contiguous())
            for position in positions:
                number, offset, token = store.locate(position)
                assert self.committed.spans[number][0] + offset == position % total
                assert token == self.committed.tokens[position]
            number = data.draw(st.integers(0, store.n_sequences - 1))
            start, stop, _ = self.committed.spans[number]
            assert same(store[site].sequence(number), rows[:, start:stop].contiguous())
            counted = sum(not flag & 7 for flag in self.committed.flags)
            finite = rows.isfinite().all(dim=-1) & torch.tensor([not flag & 7 for flag in self.committed.flags])
            found = store[site].statistics
            assert (found.rows <= counted).all()
            assert found.rows.tolist() == finite.sum(dim=1).tolist()

    @invariant()
    def nothing_is_left_half_written(self):
        if self.path.exists() and self.writer is None:
            assert not list(self.path.rglob("*.tmp"))

    def end(self):
        if getattr(self, "writer", None) is not None:
            self.writer.close()


class CacheMachine(Folder):
    """A cache that is filled, flushed, read, closed, crashed and opened."""

    @initialize(
        seq_len=st.sampled_from([1, 5, 2048, 2500]),
        d_model=st.sampled_from([1, 3, 16]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        kept=st.sampled_from([None, torch.float32, torch.float16]),
    )
    def make(self, seq_len, d_model, dtype, kept):
        self.shape, self.given, self.kept = (seq_len, d_model), dtype, kept or dtype
        self.cache = mmcache.FullActivationCache.with_capacity(2, self.path, dtype=kept, shard_tokens=2048)
        self.layers, self.flushed, self.seed = [], [], 0

    @precondition(lambda self: self.cache is not None)
    @rule(strided=st.booleans())
    def push(self, strided):
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        seq_len, d_model = self.shape
        tensor = torch.randn(*((d_model, seq_len) if strided else self.shape), generator=generator).to(self.given)
        tensor = tensor.T if strided else tensor
        self.cache.push(tensor)
        self.layers.append(tensor.to(self.kept).contiguous())

    @precondition(lambda self: self.cache is not None)
    @rule()
    def flush(self):
        self.cache.flush()
        self.flushed = list(self.layers)

    @precondition(lambda self: self.cache is not None)
    @rule()
    def push_what_does_not_fit(self):
        for bad in (torch.ones(3), torch.ones(self.shape, dtype=torch.int32), torch.ones(self.shape).tolist()):
            try:
                self.cache.push(bad)
            except mmcache.MmcacheError:
                continue
            raise AssertionError("it was taken")

    @precondition(lambda self: self.cache is not None)
    @rule(data=st.data())
    def read(self, data):
        assert self.cache.n_layers == len(self.layers)
        assert self.cache.get_layer(len(self.layers)) is None
        if self.layers:
            self.compare(self.cache, self.layers, data)

    def compare(self, cache, layers, data):
        seq_len = self.shape[0]
        layer = data.draw(st.integers(0, len(layers) - 1))
        positions = data.draw(st.lists(st.integers(-seq_len, seq_len - 1), max_size=5))
        assert (cache.seq_len, cache.d_model, cache.dtype) == (*self.shape, self.kept)
        assert same(cache.get_layer(layer), layers[layer])
        assert same(cache.get_positions(layer, positions), layers[layer][positions])
        for position in positions:
            assert same(cache.get_position(layer, position), layers[layer][position])

    @rule(data=st.data())
    def open(self, data):
        with mmcache.FullActivationCache.open(self.path) as cache:
            assert cache.n_layers == len(self.flushed)
            if self.flushed:
                self.compare(cache, self.flushed, data)

    # Nothing but opening comes after its end: not too early, then.
    @precondition(lambda self: self.cache is not None and len(self.layers) > 2)
    @rule(crash=st.booleans())
    def finish(self, crash):
        if crash:
            abandon(self.cache)
        else:
            self.cache.close()
            self.flushed = list(self.layers)
        self.cache = None

    def end(self):
        if getattr(self, "cache", None) is not None:
            self.cache.close()


# Half of the examples that a simple property gets: each is a whole history.
HISTORIES = settings(max_examples=max(1, settings.default.max_examples // 2), stateful_step_count=25)
TestWriter = WriterMachine.TestCase
TestWriter.settings = HISTORIES
TestCache = CacheMachine.TestCase
TestCache.settings = HISTORIES
