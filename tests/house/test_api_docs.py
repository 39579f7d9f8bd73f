"""docs/api.md, which scripts/api_docs.py writes, is as the docstrings are now, and has every public name."""

import importlib.util
from pathlib import Path

import pytest

ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").exists())


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("api_docs", ROOT / "scripts" / "api_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(script):
    assert script.PAGE.read_text() == script.page(), "run .venv/bin/python scripts/api_docs.py"


@pytest.mark.parametrize("path", ["mmcache", "mmcache.view", "mmcache.cluster", "mmcache.loading"])
def test_every_public_name_is_there(script, path):
    text = script.PAGE.read_text()
    for name in importlib.import_module(path).__all__:
        assert f"\n### {path}.{name}\n" in text or f"\n- **`{name}`**" in text, name
