"""README and the pages of docs/: every code block runs, every link and path leads somewhere, and README stays short."""

import ast
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from mmcache.cli import main

ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").exists())
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
STARTS_FROM_ACTS = "from the store `acts` of the [README](../README.md)"
NOT_RUN = "# not run"
# Pages about the code say where in the package a file is.
OF_THE_CODE = ("CONTRIBUTING.md", "docs/architecture.md")


def blocks(page):
    """The code blocks of a page: (language, code) of each."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def runs(language, code):
    return language == "bash" or (language == "python" and not code.startswith(NOT_RUN))


# The reference has its code from docstrings, which show calls rather than programs.
RUN = [page for page in PAGES if page.name != "api.md" and any(runs(*block) for block in blocks(page))]


def run_shell(code):
    """Run a shell block: commands of ours in this process, which saves seconds each, the others by bash."""
    for line in code.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["mmcache"]:
            with pytest.raises(SystemExit) as ended:
                main(words[1:])
            assert not ended.value.code, line
        elif words:
            subprocess.run(["bash", "-euc", line], check=True, capture_output=True)


def run_blocks(page):
    names = {"__name__": "__main__"}
    for language, code in blocks(page):
        if not runs(language, code):
            continue
        if language == "bash":
            run_shell(code)
        else:
            exec(compile(code, str(page), "exec"), names)  # noqa: S102 -- running the pages is the point
    return names


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    """The store of the README's first command, which is made once."""
    path = tmp_path_factory.mktemp("readme") / "acts"
    command = next(line for _, code in blocks(README) for line in code.splitlines() if line.startswith("mmcache ext"))
    run_shell(command.replace("README.md", shlex.quote(str(README))).replace("--out acts", f"--out {path}"))
    return path


@pytest.mark.filterwarnings("ignore::UserWarning:zarr")  # zarr says that bfloat16 is no core dtype of its own
@pytest.mark.usefixtures("s3_server")
@pytest.mark.parametrize("page", RUN, ids=[str(page.relative_to(ROOT)) for page in RUN])
def test_blocks_run_in_order(page, tmp_path, monkeypatch, request):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    shutil.copy(README, here)
    if STARTS_FROM_ACTS in " ".join(page.read_text().split()):
        shutil.copytree(request.getfixturevalue("acts"), here / "acts")
    names = run_blocks(page)
    if page == README:
        assert names["store"]["mlp_out"].gather([40, 7, 7, -1]).shape == (4, 4, 128)
        assert names["row"].shape == (768,)
    if page.name == "extracting.md":
        assert [len(names["captured"][site]) for site in ("mlp_in", "mlp_out")] == [4, 4]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_block_is_of_a_kind_that_is_known(page):
    for language, code in blocks(page):
        assert language in {"python", "bash", "console", "text"}, code
        if language == "python":
            ast.parse(code)
        if language == "console":
            for line in code.splitlines():
                assert line.startswith("$ "), line
                check_usage(shlex.split(line.removeprefix("$ "), comments=True))


def check_usage(words):
    """Parse a command line of ours, which may stand behind a launcher, without running it."""
    if "mmcache" not in words:
        return
    name, *rest = words[words.index("mmcache") + 1 :]
    command = main.get_command(click.Context(main), name)
    assert command is not None, words
    command.make_context(name, rest)


def anchors(page):
    """What GitHub calls the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        name, _, anchor = target.partition("#")
        place = page.parent / name if name else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target
    for path in re.findall(r"`((?:mmcache|scripts|docs|tests|examples)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", OF_THE_CODE)
def test_files_that_are_named_are_there(name):
    if not (ROOT / "mmcache" / "system").is_dir():
        pytest.skip("the modules are not in packages yet")
    named = re.findall(r"`(\w+(?:/\w+)*\.py)`", (ROOT / name).read_text())
    assert named
    for path in named:
        found = (ROOT / path).exists() or (ROOT / "mmcache" / path).exists() or any((ROOT / "tests").rglob(path))
        assert found, path


def test_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    figures = "\n".join(lines).split("## Figures")[1].split("\n## ")[0]
    assert len(re.findall(r"^\|", figures, re.MULTILINE)) - 2 <= 8  # the heading, and the line below it
