"""How far a job is: a bar on a terminal, a few lines everywhere else, and numbers that are the job's."""

import pytest

from mmcache.cli.progress import BytesBar, ProgressBar
from mmcache.extraction.job import Progress
from planted_stores import drawn, terminal, unstyled


def test_bytes_are_told_once_a_tenth_where_there_is_no_terminal():
    console = terminal(80)
    with BytesBar(console) as bar:
        for done in range(0, (10 << 20) + 1, 1 << 16):
            bar.update(done, 10 << 20)
    assert drawn(console).splitlines() == [f"{at}.0 MiB of 10.0 MiB" for at in range(1, 11)]


def test_a_jump_over_several_tenths_is_told_once():
    console = terminal(80)
    with BytesBar(console) as bar:
        for done in (0, 700, 700, 1000):
            bar.update(done, 1000)
    assert drawn(console).splitlines() == ["700 B of 1000 B", "1000 B of 1000 B"]


@pytest.mark.parametrize("colours", [False, True])
def test_a_job_of_no_bytes_is_told_without_a_division_by_zero(colours):
    console = terminal(80, colours=colours)
    with BytesBar(console) as bar:
        bar.update(0, 0)
    assert "of" not in drawn(console)


def test_bytes_are_a_bar_on_a_terminal():
    console = terminal(80, colours=True)
    with BytesBar(console) as bar:
        bar.update(3 << 20, 10 << 20)
    found = unstyled(drawn(console))
    assert "━" in found
    assert "3.1/10.5 MB" in found
    assert "MiB of" not in found


def step(tokens, phase="extract", *, total=1000, seconds=2.0):
    """A job of which 100 tokens were done before this run."""
    return Progress(
        phase, tokens, total, before=100, run_tokens=tokens - 100, bytes=tokens * 1_000_000, seconds=seconds
    )


def test_an_extraction_says_how_long_it_takes_after_its_first_batches_and_at_its_end():
    console = terminal(200)
    with ProgressBar(console) as bar:
        bar.update(step(12_345, "tokenise"))
        for tokens in (200, 300, 500, 700, 900, 1000):
            bar.update(step(tokens))
    lines = drawn(console).splitlines()
    # Of those in this run: what was done before it says nothing about its speed.
    assert lines[0] == "500 of 1,000 tokens, 200 tokens/s · 0.50 GB · 0.25 GB/s, about 0:00:02 left"
    assert lines[1].startswith("1,000 of 1,000 tokens, 450 tokens/s · 1.00 GB · 0.50 GB/s")
    assert len(lines) == 2


def test_a_job_that_is_over_at_once_is_told_without_a_division_by_zero():
    console = terminal(200)
    with ProgressBar(console) as bar:
        bar.update(step(100, total=100, seconds=0.0))
    assert drawn(console).startswith("100 of 100 tokens, 0 tokens/s")


def test_waiting_for_others_is_told_once():
    console = terminal(200)
    with ProgressBar(console) as bar:
        for _ in range(3):
            bar.update(step(500, "wait"))
    assert drawn(console).splitlines() == ["waiting for other workers"]


def test_an_extraction_is_a_bar_on_a_terminal():
    console = terminal(120, colours=True)
    with ProgressBar(console) as bar:
        bar.update(step(12_345, "tokenise"))
        task = bar._bar.tasks[0]
        assert (task.description, task.fields["rate"]) == ("tokenising", "12,345 tokens")
        bar.update(step(500))
    found = unstyled(drawn(console))
    for said in ("extracting", "50%", "200 tokens/s"):
        assert said in found
