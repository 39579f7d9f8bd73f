"""Coverage-guided fuzzing of what a stranger's files are read by; `--slow` takes half a million inputs of each."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from stores_and_processes import widened

pytest.importorskip("atheris", reason="atheris is not to be had for this Python")
SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz.py"
RUNS = (3000, 500_000)


@pytest.mark.parametrize("target", ["header", "root", "tokenizer"])
def test_only_our_own_errors_come(target, request, tmp_path):
    # The peak that libFuzzer looks at is inherited from who started it.
    limit = 1500 + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    done = subprocess.run(
        [sys.executable, str(SCRIPT), target, f"-runs={widened(request, RUNS)}", "-seed=1", f"-rss_limit_mb={limit}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done " in done.stderr
    assert not list(tmp_path.glob("crash-*"))
