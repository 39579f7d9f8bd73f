"""The README's pictures: the terminal's needs neither a browser nor the network, and tells nothing of this machine."""

import re
import sys
from xml.etree import ElementTree as ET

import pytest
import torch

import mmcache
from browser_pages import screenshots


def test_the_terminal_is_drawn_without_fonts_from_elsewhere_and_without_paths(tmp_path):
    with mmcache.create(tmp_path / "acts", sites={"mlp_out": 16}, n_layers=3, dtype=torch.float32) as writer:
        writer.append(torch.arange(300), {"mlp_out": torch.randn(3, 300, 16)})
    drawn = screenshots().terminal(mmcache.open(tmp_path / "acts"), "mlp_out")
    said = "".join(ET.fromstring(drawn).itertext()).replace("\xa0", " ")  # noqa: S314 -- our own
    assert "mmcache stats demo-acts --site mlp_out" in said
    for told in ("mean norm", "Norms of mlp_out, positions 0 to 300", "nothing is wrong"):
        assert told in said
    assert set(re.findall(r"\w+://[^\"' )]*", drawn)) == {"http://www.w3.org/2000/svg"}
    assert str(tmp_path) not in drawn
    # Colours of the map.
    assert "#fde725" in drawn


@pytest.mark.parametrize("name", ["terminal.svg", "page.png"])
def test_pictures_of_others_are_not_written_over(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["screenshots.py", "--out", str(tmp_path)])
    (tmp_path / name).write_text("mine")
    with pytest.raises(SystemExit) as ended:
        screenshots().main()
    assert ended.value.code == 2
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"
