from mmcache.system.memory import _available, anonymous, available_memory


def test_memory_of_our_own_begins_on_a_page_and_is_zeros():
    for size in (1, 4096, 12_345):
        memory = anonymous(size)
        assert (memory.ctypes.data % 4096, memory.any(), memory.flags.writeable) == (0, False, True)
        assert (memory.shape, memory.dtype) == ((size,), "uint8")


def test_available_memory_is_believable():
    assert 1 << 20 < available_memory() < 1 << 50


def test_available_memory_is_guessed_where_the_system_does_not_tell(monkeypatch):
    def refuse(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", refuse)
    _available.cache_clear()
    assert 1 << 20 < available_memory() < 1 << 50
    _available.cache_clear()
