"""What a store is, and what jobs say of themselves, on a terminal: whole, and whoever wrote it."""

from pathlib import Path

import pytest
from rich.cells import cell_len

import planted_stores
from damaged_stores import extracted
from mmcache.cli.render import draw_exported, draw_overview, draw_repaired, draw_report, draw_survey
from mmcache.extraction.estimate import Survey
from mmcache.ops.export import Exported
from mmcache.ops.repair import Loss, Repaired
from mmcache.ops.verify import Finding, Report
from mmcache.read.describe import overview
from mmcache.text import visible
from planted_stores import SITE, drawn, numbers, terminal, unstyled

WIDTHS = (20, 40, 60, 80, 200)
HOSTILE = "[red]x[/]\x1b[2J\u202e"
SURVEY = Survey(
    tokens=1_234_567, sequences=89, sites={"mlp_in": 768, "mlp_out": 512}, layers=(0, 1, 2, 7), dtype="bfloat16",
    layout="token", batch_size=8, bytes_a_token=10_240, total_bytes=12 << 30, bytes_to_do=3 << 30, free_bytes=4 << 30,
    shards=48, shards_to_do=12, tokens_to_do=300_000, tokens_a_second=1234.5, seconds=3723.0,
)  # fmt: skip


def told(draw, what, width=200, **options):
    console = terminal(width, **options)
    draw(console, what)
    return drawn(console)


def pairs(text):
    """Names and values of lines of two columns."""
    return {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in text.splitlines() if "  " in line}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    planted_stores.planted(tmp_path_factory.mktemp("terminal") / "acts").close()
    view = overview(next(tmp_path_factory.getbasetemp().glob("terminal*/acts")))
    return view | {"path": "acts"}


def test_an_overview_says_what_the_store_is(said):
    found = told(draw_overview, said)
    about = pairs(found)
    assert about["store"] == "grown, layout token, complete"
    assert about["tokens"] == "900 in 4 sequences"
    assert about["layers"] == "3 (0-2)"
    line = next(line for line in found.splitlines() if line.strip().startswith(SITE))
    assert line.split()[:7] == [SITE, "[3,", "900,", "16]", "2", "of", "2"]
    assert "what is there" not in found


def test_an_overview_of_an_extracted_store_says_what_it_was_made_of(tmp_path):
    store = extracted(tmp_path / "acts")
    about = pairs(told(draw_overview, overview(store.path)))
    identity = store.source["identity"]
    assert identity["model"] in about["model"]
    assert f"computed in {identity['compute_dtype']}" in about["model"]
    assert about["tokenizer"] == identity["tokenizer"][:12]
    assert about["corpus"].startswith("9 documents, ")
    assert about["contexts"] == "up to 24 tokens, by document, BOS auto"
    assert "batch_size 3" in about["numerics"]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("site", ["mlp_in", "model.layers.*.feed_forward.down_proj:out", HOSTILE])
def test_what_is_missing_is_drawn_in_one_line_whatever_the_site_is_called(said, width, site):
    about = said["sites"][SITE] | {"shards": 100, "missing": 2, "present": [1.0] * 49 + [0.0, 0.5] + [1.0] * 49}
    found = told(draw_overview, said | {"sites": {site: about}, "complete": False}, width)
    wide = min(width - 2, 100)
    # It is what is drawn last: were it folded, that would be its rest.
    strip = found.splitlines()[-1].strip()
    assert len(strip) == wide
    partly = [at for at, letter in enumerate(strip) if letter != "█"]
    assert all(abs(at - wide / 2) <= 1 for at in partly)
    assert 1 <= len(partly) <= 2
    assert "NOT COMPLETE" in " ".join(found.split())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("colours", [False, True])
def test_whatever_strangers_wrote_is_shown_and_not_obeyed(said, width, colours):
    source = {
        "record": {"name": HOSTILE, "revision": HOSTILE, "command": HOSTILE * 100, "made": [HOSTILE], "mmcache": 1},
        "identity": {"model": HOSTILE, "tokenizer": HOSTILE, "compute_dtype": {HOSTILE: HOSTILE}},
        "numerics": {HOSTILE: HOSTILE}, "tokenised": {"documents": HOSTILE, "sha256": 5},
        "modules": {HOSTILE: [HOSTILE, HOSTILE]},
    }  # fmt: skip
    view = said | {"source": source, "metadata": {HOSTILE: [HOSTILE]}, "sites": {HOSTILE: said["sites"][SITE]}}
    found = unstyled(told(draw_overview, view | {"path": HOSTILE}, width, colours=colours))
    assert all(letter.isprintable() or letter == "\n" for letter in found)
    assert found.startswith(visible(HOSTILE)[: width - 1])
    assert max(map(cell_len, found.split("\n"))) <= width


@pytest.mark.parametrize("wrong", [None, 5, "text", [1], {"identity": 3, "record": [], "modules": "x"}])
def test_a_source_that_is_none_is_no_reason_to_crash(said, wrong):
    source = wrong if isinstance(wrong, dict) else {"record": wrong, "identity": wrong, "modules": {SITE: wrong}}
    assert "grown, layout token" in told(draw_overview, said | {"source": source})


def test_a_survey_says_what_a_job_takes():
    about = pairs(told(draw_survey, SURVEY))
    assert about == {
        "tokens": "1,234,567 in 89 contexts, 8 a batch",
        "sites": "mlp_in [768], mlp_out [512] in 4 layers (0-2,7)",
        "a token": "10,240 bytes (bfloat16, layout token)",
        "total": "12.0 GiB in 48 shards",
        "to do": "3.0 GiB in 12 shards, 300,000 tokens",
        "free": "4.0 GiB",
        "time": "about 1:02:03, at 1,234 tokens/s",
    }


def test_a_survey_says_that_there_is_no_room_and_no_time_that_was_not_measured():
    full = Survey(**vars(SURVEY) | {"free_bytes": 1 << 30, "seconds": None, "tokens_a_second": None})
    found = told(draw_survey, full)
    assert "1.0 GiB  NOT ENOUGH" in found
    assert "time" not in pairs(found)


REPORT = Report(
    "acts", "full", (Finding("damaged", "mlp_in/c.0.1.0", "3 of 4 inner chunks"), Finding("missing", HOSTILE, "gone")),
    1_234, 5 << 30,
)  # fmt: skip


def test_a_report_lists_what_is_wrong():
    found = told(draw_report, REPORT)
    assert pairs(found) == {"looked at": "1,234 shards, 5.0 GiB of them read (full)", "findings": "2"}
    assert "\ndamaged: mlp_in/c.0.1.0: 3 of 4 inner chunks\n" in found
    assert f"\nmissing: {visible(HOSTILE)}: gone\n" in found
    assert pairs(told(draw_report, Report("acts", "quick", (), 2, 0)))["findings"] == "none"


@pytest.mark.parametrize(("by_extract", "said"), [(True, "makes them again"), (False, "partial=True opens the rest")])
def test_a_repair_says_what_was_done_and_what_is_lost(by_extract, said):
    lost = (Loss("mlp_in", (3,), (0, 512), (0, 9)), Loss("mlp_out", (0, 1), (512, 700), None))
    done = Repaired(REPORT, (("a", "b"),), ("zarr.json",), lost, REPORT.findings[1:], by_extract)
    found = told(draw_repaired, done)
    about = pairs(found)
    assert (about["findings"], about["set aside"]) == ("2", "1 files, in .set-aside")
    assert about["written anew"] == "zarr.json"
    assert "missing now: mlp_in, layer 3, tokens 0 to 511 (sequences 0 to 9)" in found
    assert "missing now: mlp_out, 2 layers, tokens 512 to 699 (sequences ? to ?)" in found
    assert said in found
    assert f"To be restored from a copy:\nmissing: {visible(HOSTILE)}: gone\n" in found


def test_a_repair_that_had_nothing_to_do_says_so():
    found = told(draw_repaired, Repaired(Report("acts", "full", (), 2, 9), (), (), (), (), remade_by_extract=True))
    assert pairs(found) == {"findings": "none", "set aside": "0 files, in .set-aside", "written anew": "nothing"}
    assert "again" not in found


def test_an_export_says_what_is_the_stores_own():
    found = told(draw_exported, Exported(Path("out"), 1_234, 3 << 20, 5 << 10))
    assert pairs(found) == {
        "files": "1,234, listed in index.json",
        "linked": "3.0 MiB: the store's own files, not to be edited",
        "written": "5.0 KiB",
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_jobs_fit_on_any_terminal_and_no_number_is_cut(said, width):
    for draw, what in (
        (draw_survey, SURVEY),
        (draw_overview, said),
        (draw_exported, Exported(Path("out"), 1_234, 3 << 20, 5 << 10)),
    ):
        found = told(draw, what, width)
        assert max(map(cell_len, found.split("\n"))) <= width
        assert numbers(found) <= numbers(told(draw, what))
