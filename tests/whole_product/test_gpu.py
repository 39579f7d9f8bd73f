"""From CUDA to disk and back: the same bits, in order with the caller's own work, without waiting for it."""

import pytest
import torch

import mmcache
from stores_and_processes import DTYPES, Twin, random_bits, same

pytestmark = [
    pytest.mark.gpu,
    # Here too, so that the file can be run on its own wherever it is.
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "acts"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("seq_len", "d_model"), [(1, 1), (1000, 129), (5000, 64)])
def test_push_from_cuda_and_read_to_cuda(path, dtype, seq_len, d_model):
    layers = [random_bits(seq_len, d_model, dtype=dtype, seed=layer) for layer in range(6)]
    with mmcache.FullActivationCache.with_capacity(6, path, shard_tokens=4096) as cache:
        for layer in layers:
            cache.push(layer.cuda())
        for number, layer in enumerate(layers):
            found = cache.get_layer(number, "cuda")
            assert found.device.type == "cuda"
            assert same(found.cpu(), layer)
            assert same(cache.get_layer(number), layer)
            assert same(cache.get_position(number, -1, device="cuda").cpu(), layer[-1])
            assert same(cache.get_positions(number, [0, -1, 0], torch.device("cuda")).cpu(), layer[[0, -1, 0]])
    with mmcache.FullActivationCache.open(path) as cache:
        assert all(same(cache.get_layer(number), layer) for number, layer in enumerate(layers))


STRIDES = {
    "transposed": lambda values: values.T.contiguous().T,
    "sliced": lambda values: values.repeat_interleave(2, dim=1)[:, ::2],
    "rows of a batch": lambda values: torch.stack([values, values + 1])[0],
    "expanded": lambda values: values[:1].expand(values.shape),
    "with grad": lambda values: values.clone().requires_grad_(),
}


@pytest.mark.parametrize("kind", STRIDES)
def test_any_strides_on_the_device(path, kind):
    tensor = STRIDES[kind](torch.randn(300, 40, device="cuda"))
    expected = tensor.detach().cpu().contiguous()
    with mmcache.FullActivationCache.with_capacity(1, path) as cache:
        cache.push(tensor)
        assert same(cache.get_layer(0), expected)


@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize("kept", DTYPES, ids=str)
def test_the_cast_on_the_device_is_the_hosts(path, given, kept):
    tensor = (torch.randn(200, 33, dtype=torch.float64) * 1000).to(given)
    with mmcache.FullActivationCache.with_capacity(1, path, dtype=kept) as cache:
        cache.push(tensor.cuda())
        assert same(cache.get_layer(0), tensor.to(kept))


@pytest.mark.parametrize("layout", ["layer", "token"])
def test_overflow_on_the_device_is_counted(path, layout):
    rows = torch.ones(2, 50, 8)
    rows[1, 3, 4] = rows[1, 40, 0] = 1e6
    rows[0, 5, 5] = torch.inf
    with mmcache.create(path, sites={"a": 8}, n_layers=2, dtype=torch.float16, layout=layout) as writer:
        writer.append([1] * 50, {"a": rows.cuda()})
    with mmcache.open(path) as store:
        assert store["a"].statistics.overflow.tolist() == [0, 2]
        assert same(store["a"].gather(range(50)), rows.half().transpose(0, 1).contiguous())


@pytest.mark.parametrize("layout", ["layer", "token"])
@pytest.mark.parametrize("as_list", [False, True])
def test_append_from_cuda(path, layout, as_list):
    sites = {"mlp_in": 24, "mlp_out": 129}
    twin = Twin(sites, 3, torch.bfloat16)
    with mmcache.create(
        path, sites=sites, n_layers=3, dtype=torch.bfloat16, layout=layout, shard_tokens=2048
    ) as writer:
        for number, length in enumerate([5, 3000, 1, 700]):
            rows = {
                site: random_bits(3, length, width, dtype=torch.bfloat16, seed=number) for site, width in sites.items()
            }
            given = {site: values.cuda() for site, values in rows.items()}
            writer.append(
                torch.arange(length, device="cuda"),
                {site: list(values) for site, values in given.items()} if as_list else given,
            )
            twin.append(range(length), rows)
            if number == 1:
                writer.commit()
    twin.check_path(path)


def test_layers_on_both_sides(path):
    # Embeddings on the host, the rest on the device: a model that is offloaded in part.
    layers = [torch.randn(10, 4), torch.randn(10, 4).cuda(), torch.randn(10, 4).cuda()]
    for layout in ("layer", "token"):
        with mmcache.create(path / layout, sites={"a": 4}, n_layers=3, dtype=torch.float32, layout=layout) as writer:
            writer.append(range(10), {"a": layers})
            writer.append(range(10), {"a": layers[::-1]})
        with mmcache.open(path / layout) as store:
            for layer in range(3):
                expected = torch.cat([layers[layer].cpu(), layers[2 - layer].cpu()])
                assert same(store["a"].get_layer(layer), expected)


@pytest.mark.parametrize("how", ["push", "append"])
def test_the_tensor_may_be_written_to_at_once(path, how):
    # The next layer of many models is written into the same memory. What is stored is what was there in the
    # order of the stream, though the copy to the host happens later.
    busy = torch.randn(4096, 4096, device="cuda")
    buffer = torch.empty(2000, 512, device="cuda")
    with mmcache.FullActivationCache.with_capacity(8, path / "cache") as cache:
        writer = mmcache.create(path / "store", sites={"a": 512}, n_layers=1, dtype=torch.float32)
        for number in range(8):
            for _ in range(5):
                busy = busy @ busy / busy.norm()
            buffer.fill_(number)
            if how == "push":
                cache.push(buffer)
            else:
                writer.append([number] * 2000, {"a": buffer[None]})
            buffer.fill_(-1)
        writer.close()
        for number in range(8):
            if how == "push":
                found = cache.get_layer(number)
            else:
                with mmcache.open(path / "store") as store:
                    found = store["a"].sequence(number)
            assert (found == number).all()


def test_the_tensors_memory_may_be_used_again_at_once(path):
    # Freed by its last reference, and taken by the next allocation, while the copy is still to come.
    busy = torch.randn(4096, 4096, device="cuda")
    with mmcache.FullActivationCache.with_capacity(16, path) as cache:
        for number in range(16):
            busy = busy @ busy / busy.norm()
            cache.push(torch.full((3000, 256), float(number), device="cuda"))
            torch.full((3000, 256), -1.0, device="cuda")
        for number in range(16):
            assert (cache.get_layer(number) == number).all()


def test_push_follows_the_stream_that_it_is_called_on(path):
    busy, stream = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with mmcache.FullActivationCache.with_capacity(1, path) as cache:
        with torch.cuda.stream(stream):
            for _ in range(10):
                busy = busy @ busy / busy.norm()
            late = busy[:100] * 0 + 5
            cache.push(late)
        assert (cache.get_layer(0) == 5).all()


@pytest.mark.parametrize("kept", [None, torch.float16, torch.bfloat16])
def test_push_does_not_wait_for_the_device(path, kept):
    tensor = torch.randn(100, 64, device="cuda")
    with mmcache.FullActivationCache.with_capacity(8, path, dtype=kept) as cache:
        # The first pushes make the slots, pinned, and the first pinned counter of overflow.
        for _ in range(4):
            cache.push(tensor)
        cache.flush()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            # As many as there are slots, all of them free.
            for _ in range(4):
                cache.push(tensor)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for layer in range(8):
            assert same(cache.get_layer(layer), tensor.cpu().to(cache.dtype))


def test_push_returns_before_the_work_behind_it_is_done(path):
    busy = torch.randn(8192, 8192, device="cuda")
    done = torch.cuda.Event()
    with mmcache.FullActivationCache.with_capacity(2, path) as cache:
        cache.push(torch.zeros(100, 64, device="cuda"))
        cache.flush()
        torch.cuda.synchronize()
        for _ in range(50):
            busy = busy @ busy / 100
        layer = busy[:100, :64].contiguous()
        done.record()
        cache.push(layer)
        assert not done.query(), "push waited for the forward pass"
        assert same(cache.get_layer(1), layer.cpu())


def test_reading_to_the_device(path):
    sites = {"a": 1024}
    twin = Twin(sites, 2, torch.float32)
    with mmcache.create(path, sites=sites, n_layers=2, dtype=torch.float32, shard_tokens=2048) as writer:
        rows = {"a": torch.randn(2, 6000, 1024)}
        writer.append(range(6000), rows)
        twin.append(range(6000), rows)
    with mmcache.open(path) as store:
        site = store["a"]
        picked = torch.randperm(6000)[:3000]
        expected = twin.rows["a"][:, picked].transpose(0, 1).contiguous()
        assert same(site.gather(picked, device="cuda").cpu(), expected)
        assert same(site.gather(picked.cuda(), device="cuda").cpu(), expected)
        out = torch.empty(expected.shape, device="cuda")
        assert site.gather(picked, out=out) is out
        assert same(out.cpu(), expected)
        # 24 MiB through two pinned buffers of 16.
        assert same(site.get_layer(1, "cuda").cpu(), twin.rows["a"][1])
        assert same(site.sequence(0, "cuda").cpu(), twin.rows["a"])
        assert site.gather([], device="cuda").shape == (0, 2, 1024)
        assert site.get_position(0, 5, "cuda").device == torch.device("cuda", torch.cuda.current_device())


def test_close_unpins_what_it_pinned(path):
    with mmcache.FullActivationCache.with_capacity(1, path) as cache:
        cache.push(torch.randn(10, 4, device="cuda"))
        cache.flush()
        slots = list(cache._writer._pipeline.ring._slots)
        assert any(slot.pinned for slot in slots)
    assert not any(slot.pinned for slot in slots)
    torch.cuda.synchronize()
