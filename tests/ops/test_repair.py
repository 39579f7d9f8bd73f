"""What repair sets aside, what comes back, and what it says is lost."""

import json

import pytest
import torch
from click.testing import CliRunner

import mmcache
from damaged_stores import cache, extracted, grown
from mmcache.cli import main
from mmcache.ops.repair import ASIDE
from mmcache.system.locks import FolderLock
from small_models import contents
from stores_and_processes import damage, flip, shards, tree


def test_a_sound_store_is_left_as_it_is(tmp_path):
    grown(tmp_path / "acts")
    before = tree(tmp_path / "acts")
    done = mmcache.repair(tmp_path / "acts")
    assert (done.aside, done.rewritten, done.lost, done.left) == ((), (), (), ())
    assert tree(tmp_path / "acts") == before


def test_extract_makes_again_what_was_set_aside(tmp_path):
    path = tmp_path / "acts"
    extracted(path)
    whole = contents(path)
    bad = {file.name: file for file in shards(path / "mlp_in")[:2]}
    for file in bad.values():
        damage(file, flip(5000))
    damaged = {name: file.read_bytes() for name, file in bad.items()}
    shards(path / "mlp_out")[-1].unlink()
    done = mmcache.repair(path)
    assert done.remade_by_extract
    assert not done.left
    assert {file for file, _ in done.aside} == {f"mlp_in/{name}" for name in bad}
    for file, there in done.aside:
        assert there.startswith(f"{ASIDE}/mlp_in/")
        assert (path / there).read_bytes() == damaged[file.split("/")[1]], "nothing is deleted"
    assert sorted(loss.site for loss in done.lost) == ["mlp_in", "mlp_in", "mlp_out"]
    assert mmcache.repair(path).aside == ()
    extracted(path)
    assert mmcache.verify(path).ok
    found = {name: data for name, data in contents(path).items() if ASIDE not in str(name)}
    assert found == whole


def test_what_has_no_source_is_lost_by_sequence_and_the_rest_can_be_read(tmp_path):
    path = tmp_path / "acts"
    with grown(path) as store:
        rows = store["a"].gather(range(600))
    damage(shards(path / "a")[1], flip(4096 + 100))
    done = mmcache.repair(path)
    (loss,) = done.lost
    # Sequences of 100, 300 and 200 tokens; shards of 256.
    assert (loss.site, loss.layers, loss.tokens, loss.sequences) == ("a", (0, 1), (256, 512), (1, 2))
    assert not done.remade_by_extract
    with pytest.raises(mmcache.CorruptError, match="partial=True"):
        mmcache.open(path)
    with pytest.raises(mmcache.CorruptError):
        mmcache.append(path)
    with mmcache.open(path, partial=True) as store:
        there = [*range(256), *range(512, 600)]
        assert torch.equal(store["a"].gather(there), rows[there])
        assert store["b"].gather(range(600)).shape == (600, 2, 4)
        with pytest.raises(mmcache.IncompleteError):
            store["a"].get_position(0, 256)


def test_a_layer_of_a_cache_is_lost_alone(tmp_path):
    path = tmp_path / "cache"
    cache(path)
    damage(path / "resid_post" / "c.1.0.0", lambda data: data[:-1])
    (loss,) = mmcache.repair(path).lost
    assert (loss.layers, loss.tokens, loss.sequences) == ((1,), (0, 256), (0, 0))


def test_metadata_is_written_anew_and_merged_statistics_come_back(tmp_path):
    path = tmp_path / "acts"
    mean = extracted(path)["mlp_in"].statistics.mean
    before = (path / "tokens" / "zarr.json").read_bytes()
    damage(path / "tokens" / "zarr.json", flip(100))
    (path / "mlp_in" / "zarr.json").unlink()
    damage(path / "statistics" / "mlp_in" / "dimensions" / "c" / "0" / "0" / "0", flip(50))
    done = mmcache.repair(path, "quick")
    assert sorted(done.rewritten) == ["mlp_in/zarr.json", "tokens/zarr.json"]
    assert not done.lost
    assert not done.left
    assert (path / "tokens" / "zarr.json").read_bytes() == before
    assert mmcache.verify(path).ok
    assert torch.allclose(mmcache.open(path)["mlp_in"].statistics.mean, mean, equal_nan=True)


def test_what_only_a_copy_brings_back_is_left_and_said(tmp_path):
    path = tmp_path / "acts"
    grown(path)
    for file in (path / "tokens" / "c.0", path / "sequences" / "c.0.0"):
        damage(file, flip(4100))
    before = tree(path)
    done = mmcache.repair(path)
    assert sorted({finding.file for finding in done.left}) == ["sequences/c.0.0", "tokens/c.0"]
    assert not done.aside
    assert tree(path) == before
    damage(shards(path / "a")[0], flip(5000))
    assert mmcache.repair(path).lost[0].sequences is None
    damage(path / "zarr.json", flip(100))
    with pytest.raises(mmcache.CorruptError):
        mmcache.repair(path)


def test_a_store_that_is_being_written_is_not_repaired(tmp_path):
    path = tmp_path / "acts"
    grown(path)
    lock = FolderLock(path)
    with pytest.raises(mmcache.LockedError):
        mmcache.repair(path)
    lock.release()


def test_the_command_says_what_it_did(tmp_path):
    path = tmp_path / "acts"
    grown(path)
    run = CliRunner().invoke
    assert run(main, ["repair", str(path)]).exit_code == 0
    damage(shards(path / "a")[0], flip(5000))
    said = run(main, ["repair", str(path)])
    assert said.exit_code == 1
    assert "a, 2 layers, tokens 0 to 255 (sequences 0 to 1)" in said.stdout
    again = json.loads(run(main, ["repair", str(path), "--json"]).stdout)
    assert again["aside"] == []
    assert again["lost"][0]["tokens"] == [0, 256]
