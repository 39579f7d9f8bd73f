"""Full verify finds whatever is wrong with any byte of a store, quick what is wrong with names, sizes and headers."""

import json
import os
import re
import shutil

import pytest
import torch
from click.testing import CliRunner

import mmcache
from damaged_stores import MAKERS, TEXTS, Damaged, cache, extracted, files_of, grown
from mmcache.cli import main
from stores_and_processes import abandon, damage, flip, shards, tree, widened

# Of each kind of store: in the suite, and with --slow.
FLIPS, CUTS = (30, 2000), (12, 400)


@pytest.fixture(scope="module", params=MAKERS)
def made(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "acts"
    MAKERS[request.param](path)
    return path


def kinds(report):
    return sorted({finding.kind for finding in report.findings})


def read_all(path, **options):
    """Read everything that there is to read: each answer, or the error that came instead, which must be ours."""
    said = []

    def note(work):
        try:
            said.append(work())
        except mmcache.MmcacheError as error:
            said.append(type(error))

    try:
        store = mmcache.open(path, partial=True, **options)
    except mmcache.MmcacheError as error:
        return [type(error)]
    note(lambda: store.tokens.numpy().tobytes())
    note(lambda: store.flags.numpy().tobytes())
    note(lambda: [tuple(span) for span in store.sequences])
    for site in store.sites:
        note(lambda site=site: store[site].gather(range(store.n_tokens)).view(torch.uint8).numpy().tobytes())
        note(lambda site=site: store[site].get_position(store.layers[-1], -1).view(torch.uint8).numpy().tobytes())
        note(lambda site=site: store[site].statistics.mean.numpy().tobytes())
    return said


def test_a_sound_store_has_no_findings(made):
    before = tree(made)
    for level in ("quick", "full"):
        report = mmcache.verify(made, level)
        assert report.ok, report.findings
        assert report.shards == len(list(made.rglob("c.*")))
    assert report.bytes == sum(file.stat().st_size for file in made.rglob("c.*"))
    assert tree(made) == before


def campaign(made, tmp_path, count, seed, change):
    path = shutil.copytree(made, tmp_path / "copy")
    damaged, right, missed = Damaged(path, seed), read_all(made), []
    for number in range(count):
        file = damaged.any_file()
        data = file.read_bytes()
        new = change(damaged, data)
        damage(file, lambda _, new=new: new)
        if mmcache.verify(path).ok:
            missed.append((number, file.name, len(data), len(new)))
        # No reader is ended by it, and one that checks gives what is right, or our error.
        read_all(path)
        for found, wanted in zip(read_all(path, check=True), right, strict=False):
            assert isinstance(found, type) or found == wanted, (number, file.name)
        damage(file, lambda _, data=data: data)
    assert not missed
    assert mmcache.verify(path).ok


def test_every_flipped_bit_is_found(made, tmp_path, request):
    campaign(made, tmp_path, widened(request, FLIPS), 1, lambda damaged, data: damaged.flip(data)[0])


def test_every_truncation_and_extension_is_found(made, tmp_path, request):
    campaign(made, tmp_path, widened(request, CUTS), 2, lambda damaged, data: damaged.resize(data))


def test_each_byte_of_a_small_shard_counts(tmp_path):
    grown(tmp_path / "acts")
    file = shards(tmp_path / "acts" / "a")[-1]
    data = file.read_bytes()
    # Of what is behind the header, every byte of what is not rows, and some that are.
    for offset in [*range(4096, len(data), 509), *range(len(data) - 300, len(data))]:
        damage(file, flip(offset))
        found = mmcache.verify(tmp_path / "acts").findings
        assert {(finding.kind, finding.file) for finding in found} == {("damaged", "a/c.0.2.0")}, offset
        damage(file, flip(offset))


def test_all_is_found_and_not_only_the_first(tmp_path):
    path = tmp_path / "acts"
    extracted(path)
    one, two = shards(path / "mlp_in")[:2]
    damage(one, flip(5000))
    two.unlink()
    damage(shards(path / "mlp_out")[0], lambda data: data[:-4096])
    damage(path / "tokens" / "zarr.json", lambda data: data.replace(b"int32", b"int64"))
    damage(path / "flags" / "c.0", flip(4097))
    found = {finding.file: finding for finding in mmcache.verify(path).findings}
    assert {file: finding.kind for file, finding in found.items()} == {
        "mlp_in/c.0.0.0": "damaged", "mlp_in/c.0.1.0": "missing", "mlp_out/c.0.0.0": "foreign",
        "tokens/zarr.json": "metadata", "flags/c.0": "damaged",
    }  # fmt: skip
    assert found["mlp_in/c.0.1.0"].tokens == (64, 128)
    assert found["mlp_in/c.0.1.0"].layers == mmcache.open(path, partial=True).layers
    assert "inner chunk 0 of 1" in found["mlp_in/c.0.0.0"].what
    quick = {finding.file: finding.kind for finding in mmcache.verify(path, "quick").findings}
    assert quick == {
        "mlp_in/c.0.1.0": "missing", "mlp_out/c.0.0.0": "foreign", "tokens/zarr.json": "metadata",
    }  # fmt: skip


def test_swapped_and_foreign_shards_are_found_quickly(tmp_path):
    extracted(tmp_path / "one")
    extracted(tmp_path / "two", [text[::-1] for text in ("another corpus, quite another one", "of two texts " * 9)])
    path = tmp_path / "one"
    first, second = shards(path / "mlp_in")[:2]
    first.rename(path / "x")
    second.rename(first)
    (path / "x").rename(second)
    shutil.copy(shards(tmp_path / "two" / "mlp_out")[0], path / "mlp_out" / "c.0.0.0.new")
    (path / "mlp_out" / "c.0.0.0.new").rename(path / "mlp_out" / "c.0.0.0")
    found = mmcache.verify(path, "quick").findings
    assert [(finding.kind, finding.file) for finding in found] == [
        ("foreign", "mlp_in/c.0.0.0"), ("foreign", "mlp_in/c.0.1.0"), ("foreign", "mlp_out/c.0.0.0"),
    ]  # fmt: skip


def test_a_shard_of_other_texts_is_found_by_its_tokens(tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    # The first context is the same, and all settings: nothing else tells them apart.
    extracted(mine)
    extracted(other, [TEXTS[0], *(text.upper() for text in TEXTS[1:])])
    places = [str(file.relative_to(mine)) for site in ("mlp_in", "mlp_out") for file in shards(mine / site)]
    for place in places:
        damage(other / place, lambda _, place=place: (mine / place).read_bytes())
    assert mmcache.verify(other, "quick").ok
    found = mmcache.verify(other).findings
    assert [(finding.kind, finding.file) for finding in found] == [("foreign", place) for place in places]
    assert "other tokens" in found[0].what
    # Where the tokens cannot be read, only that is known.
    (other / "tokens" / "c.0").unlink()
    assert [(finding.kind, finding.array) for finding in mmcache.verify(other).findings] == [("missing", "tokens")]


def test_a_shard_depends_on_what_its_first_context_began_with(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    # One context over two shards: of the second, only what came before differs.
    # The others are of a second context.
    extracted(one, ["same" + "x" * 200], context_length=128)
    extracted(two, ["sbme" + "x" * 200], context_length=128)
    ids = [
        [re.search(rb'"ids":"(\w+)"', file.read_bytes()[:4096])[1] for file in shards(path / "mlp_in")]
        for path in (one, two)
    ]
    assert [a != b for a, b in zip(*ids, strict=True)] == [True, True, False, False]


def test_a_shard_that_no_plan_knows_is_unexpected(tmp_path):
    path = tmp_path / "acts"
    extracted(path)
    shutil.copy(shards(path / "mlp_in")[0], path / "mlp_in" / "c.0.99.0")
    (finding,) = mmcache.verify(path).findings
    assert (finding.kind, finding.file) == ("unexpected", "mlp_in/c.0.99.0")


@pytest.mark.parametrize("level", ["quick", "full"])
def test_what_is_no_plain_file_is_foreign_and_hangs_nobody(tmp_path, level):
    path = tmp_path / "acts"
    grown(path)
    files = shards(path / "a")
    kept = tmp_path / "kept"
    shutil.move(files[0], kept)
    files[0].symlink_to(kept)
    files[1].unlink()
    os.mkfifo(files[1])
    files[2].unlink()
    files[2].mkdir()
    found = mmcache.verify(path, level).findings
    assert [(finding.kind, finding.file) for finding in found] == [("foreign", f"a/{file.name}") for file in files]
    assert "symbolic link" in found[0].what
    with pytest.raises(mmcache.CorruptError, match="symbolic link"):
        mmcache.open(path)["a"].get_position(0, 0)


def test_a_folder_that_leads_out_of_the_store_is_refused(tmp_path):
    path = tmp_path / "acts"
    grown(path)
    (path / "a").rename(tmp_path / "elsewhere")
    (path / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(mmcache.CorruptError, match="symbolic link"):
        mmcache.open(path)["a"]
    report = mmcache.verify(path)
    assert {(finding.kind, finding.file) for finding in report.findings} == {("foreign", "a")}
    # The whole store may be a link: that is the user's own.
    (tmp_path / "link").symlink_to(shutil.copytree(tmp_path / "elsewhere", tmp_path / "x").parent)
    with pytest.raises(mmcache.StoreNotFoundError):
        mmcache.verify(tmp_path / "link")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_unreadable(tmp_path):
    grown(tmp_path / "acts")
    file = shards(tmp_path / "acts" / "a")[0]
    file.chmod(0)
    (finding,) = mmcache.verify(tmp_path / "acts").findings
    assert finding.kind == "unreadable"
    assert "EACCES" in finding.what


def test_a_failing_device_is_unreadable(tmp_path, monkeypatch):
    grown(tmp_path / "acts")
    bad, real = shards(tmp_path / "acts" / "a")[0].stat().st_ino, os.preadv

    def preadv(fd, buffers, offset, *flags):
        if os.fstat(fd).st_ino == bad and offset + len(buffers[0]) > 4096:
            raise OSError(5, "Input/output error")
        return real(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    (finding,) = mmcache.verify(tmp_path / "acts").findings
    assert (finding.kind, finding.file) == ("unreadable", "a/c.0.0.0")
    assert "EIO" in finding.what


def test_what_a_crash_leaves_ahead_of_the_commit_is_fine(tmp_path):
    grown(tmp_path / "acts")
    writer = mmcache.append(tmp_path / "acts")
    writer.append(torch.arange(400), {"a": torch.randn(2, 400, 8), "b": torch.randn(2, 400, 4)})
    abandon(writer)
    made = cache(tmp_path / "cache")
    assert made.n_layers == 3
    assert mmcache.verify(tmp_path / "acts").ok
    assert len(shards(tmp_path / "acts" / "a")) > 2


def test_a_store_that_is_not_complete_says_what_is_missing(tmp_path):
    path = tmp_path / "acts"
    extracted(path)
    for file in shards(path / "mlp_out")[1:]:
        file.unlink()
    report = mmcache.verify(path)
    assert kinds(report) == ["missing"]
    assert len(report.findings) == mmcache.open(path, partial=True).n_shards("mlp_out") - 1


def test_a_damaged_root_is_a_finding_and_no_store_is_an_error(tmp_path):
    path = tmp_path / "acts"
    grown(path)
    damage(path / "zarr.json", flip(200))
    (finding,) = mmcache.verify(path).findings
    assert (finding.kind, finding.file) == ("metadata", "zarr.json")
    # Another format version, which a flipped bit may say too.
    damage(path / "zarr.json", flip(200))
    damage(path / "zarr.json", lambda data: data.replace(b'"format": 2', b'"format": 3', 1))
    (finding,) = mmcache.verify(path).findings
    assert "format version 3" in finding.what
    with pytest.raises(mmcache.StoreNotFoundError):
        mmcache.verify(tmp_path)
    with pytest.raises(mmcache.ArgumentError, match="'quick' or 'full'"):
        mmcache.verify(path, "deep")


def test_statistics_that_were_merged_are_looked_at(tmp_path):
    path = tmp_path / "acts"
    extracted(path)
    files = [
        file for file in files_of(path / "statistics") if "mlp_in" in file.parts or file.parent.name == "statistics"
    ]
    assert len(files) == 6
    for file in files:
        damage(file, flip(len(file.read_bytes()) // 2))
        (finding,) = mmcache.verify(path, "quick").findings
        assert finding.kind == "metadata"
        assert finding.file.startswith("statistics")
        damage(file, flip(len(file.read_bytes()) // 2))
    assert mmcache.verify(path).ok


def test_the_command_says_all_and_exits_with_what_it_found(tmp_path):
    path = tmp_path / "acts"
    grown(path)
    run = CliRunner().invoke
    sound = run(main, ["verify", str(path), "--level", "quick"])
    assert sound.exit_code == 0
    assert "none" in sound.stdout
    damage(shards(path / "a")[0], flip(5000))
    bad = run(main, ["verify", str(path)])
    assert bad.exit_code == 1
    assert "damaged: a/c.0.0.0: inner chunk 0" in bad.stdout
    said = json.loads(run(main, ["verify", str(path), "--json"]).stdout)
    assert said["ok"] is False
    assert said["findings"][0]["tokens"] == [0, 256]
    assert run(main, ["verify", str(tmp_path)]).exit_code == 2


def test_progress_goes_from_nothing_to_all(made):
    told = []
    report = mmcache.verify(made, progress=lambda done, total: told.append((done, total)))
    assert max(told) == (report.bytes, report.bytes)
    quick = []
    mmcache.verify(made, "quick", progress=lambda done, total: quick.append((done, total)))
    assert quick[-1] == (report.bytes, report.bytes)
