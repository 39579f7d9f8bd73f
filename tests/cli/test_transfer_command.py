"""`mmcache push` and `mmcache pull`: what they say, and how they end."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

import damaged_stores
import mmcache
from mmcache.cli import main
from small_models import contents
from stores_and_processes import without_sync


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    path = tmp_path_factory.mktemp("command") / "acts"
    damaged_stores.extracted(path).close()
    return path


@pytest.fixture
def url(tmp_path, monkeypatch):
    without_sync(monkeypatch)
    return f"file://{tmp_path}/remote"


def run(*args, code=0):
    result = CliRunner().invoke(main, list(map(str, args)))
    assert result.exit_code == code, result.output
    return result


def test_there_and_back(acts, url, tmp_path):
    pushed = json.loads(run("push", acts, url, "--json").stdout)
    size = sum(map(len, contents(acts).values()))
    assert pushed == {
        "source": str(acts), "destination": url, "shards": 13, "there": 0, "bytes": size, "missing": 0,
    }  # fmt: skip
    pulled = json.loads(run("pull", url, tmp_path / "back", "--json").stdout)
    assert pulled == pushed | {"source": url, "destination": str(tmp_path / "back")}
    assert contents(tmp_path / "back") == contents(acts)
    assert json.loads(run("pull", url, tmp_path / "back", "--json").stdout)["there"] == 13
    result = run("push", acts, url)
    assert re.search(r"copied\s+0 shards, 0 B", result.stdout)
    assert re.search(r"there already\s+13 shards", result.stdout)


def test_progress_goes_to_stderr(acts, url):
    result = run("push", acts, url, "--json")
    json.loads(result.stdout)
    assert re.search(r"KiB of [\d.]+ KiB", result.stderr)


def test_parts(acts, url, tmp_path):
    run("push", acts, url, "--sites", "mlp_in, mlp_out")
    pulled = json.loads(
        run("pull", url, tmp_path / "back", "--sites", "mlp_in", "--sequences", "0-1,3", "--json").stdout
    )
    assert pulled["missing"] == 0
    said = json.loads(run("info", tmp_path / "back", "--json", code=1).stdout)
    assert list(said["sites"]) == ["mlp_in"]
    assert 0 < said["sites"]["mlp_in"]["missing"] < 5
    assert "sequence 99 not in store" in run("pull", url, tmp_path / "back", "--sequences", "99", code=2).stderr
    assert "0-5,8" in run("pull", url, tmp_path / "back", "--sequences", "x", code=2).stderr
    assert "nothing" in run("pull", url, tmp_path / "back", "--sites", "nothing", code=2).stderr


def test_what_the_source_does_not_have_is_said(acts, url, tmp_path):
    run("push", acts, url, "--sequences", "0")
    result = run("pull", url, tmp_path / "back", code=1)
    assert re.search(r"missing\s+8 shards", result.stdout)


def test_errors_are_one_sentence(acts, url, tmp_path):
    assert "no mmcache store there" in run("pull", url, tmp_path / "back", code=2).stderr
    assert "expected an address" in run("push", acts, tmp_path / "elsewhere", code=2).stderr
    run("push", acts, url)
    damaged_stores.grown(tmp_path / "other").close()
    result = run("push", tmp_path / "other", url, code=2)
    assert "another store is there" in result.stderr
    assert "Traceback" not in result.stderr
    key = tmp_path / "remote" / "mlp_in" / "c.0.0.0"
    key.write_bytes(key.read_bytes()[:-1])
    assert f"{url}/mlp_in/c.0.0.0" in run("pull", url, tmp_path / "back", code=1).stderr


def test_ctrl_c_says_that_the_same_command_goes_on(acts, url):
    slow = (
        "import time, mmcache.ops.copy_shards as s; from mmcache.cli import main; carry = s.Uploader._carry\n"
        "def slow(self, shard):\n    print('copying', flush=True); time.sleep(0.5); return carry(self, shard)\n"
        "s.Uploader._carry = slow; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, "push", str(acts), url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "stopped. What was copied stays; run the same command to resume" in told
    assert time.monotonic() - began < 20
    run("push", acts, url)
    assert mmcache.verify(acts).ok
    assert os.path.exists(url.removeprefix("file://") + "/zarr.json")  # noqa: PTH110 -- a URL's path
