"""Every code block of the README runs, in order, in one folder."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def test_every_block_is_of_a_kind_that_is_run():
    assert BLOCKS
    assert {language for language, _ in BLOCKS} == {"python", "bash"}


@pytest.mark.filterwarnings("ignore::UserWarning:zarr")  # zarr says that bfloat16 is no core dtype of its own
@pytest.mark.usefixtures("s3_server")
def test_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(README, tmp_path)
    here = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    names = {}
    for language, code in BLOCKS:
        if language == "bash":
            subprocess.run(["bash", "-euc", code], check=True, env=here, capture_output=True, text=True)
        else:
            exec(compile(code, str(README), "exec"), names)  # noqa: S102 -- running the README is the point
    store = names["store"]
    assert store["resid_post"].gather([40, 7, 7, -1]).shape == (4, 4, 128)
    assert names["row"].shape == (768,)
    assert [len(names["captured"][site]) for site in ("mlp_in", "mlp_out")] == [4, 4]


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
