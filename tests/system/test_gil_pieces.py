from mmcache.system.threads import pieces


def test_few_numbers_come_in_pieces_for_which_numpy_keeps_the_lock():
    assert pieces(0, 1000) == []
    assert pieces(500, 1000) == [slice(0, 500)]
    assert pieces(1024, 1 << 14) == [slice(0, 500), slice(500, 1000), slice(1000, 1024)]
    assert [piece.stop - piece.start for piece in pieces(8000, 1 << 14)] == [500] * 16


def test_many_come_in_long_pieces():
    assert pieces(20_000, 1 << 14) == [slice(0, 1 << 14), slice(1 << 14, 20_000)]


def test_rows_of_several_numbers_come_in_shorter_pieces():
    assert pieces(100, 1000, width=12) == [slice(0, 41), slice(41, 82), slice(82, 100)]
    assert pieces(1000, 1000, width=12) == [slice(0, 1000)]
    assert pieces(2, 1000, width=600) == [slice(0, 1), slice(1, 2)]
