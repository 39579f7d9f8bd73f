"""What a store is, and what a job will do or did, on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmcache.cli.heat import strip
from mmcache.cli.tables import draw_lines, draw_pairs, draw_rows, draw_text
from mmcache.text import duration, ranges, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from mmcache.extraction.estimate import Survey
    from mmcache.ops.export import Exported
    from mmcache.ops.repair import Repaired
    from mmcache.ops.verify import Finding, Report

__all__ = ["draw_exported", "draw_overview", "draw_repaired", "draw_report", "draw_survey"]


# A command over a thousand files fills no screen; `--json` has it whole.
_COMMAND = 200


def draw_overview(console: Console, view: dict[str, Any]) -> None:
    """Draw `view.overview`."""
    source = view["source"]
    pairs = {
        "store": f"{view['kind']}, layout {view['layout']}, {'complete' if view['complete'] else 'NOT COMPLETE'}",
        "tokens": f"{view['n_tokens']:,} in {view['n_sequences']:,} sequences",
        "layers": f"{view['n_layers']} ({ranges(view['layers'])})" if view["layers"] else "0",
        "dtype": str(view["dtype"]),
        "size": f"{size(view['bytes'])}, {view['shard_tokens']} tokens a shard",
    }
    pairs |= _origin(source)
    if view["metadata"]:
        pairs["metadata"] = str(view["metadata"])
    draw_pairs(console, view["path"], pairs)
    rows = [
        {
            "site": site,
            "shape": f"[{view['n_layers']}, {view['n_tokens']}, {said['d_model']}]",
            "shards": f"{said['shards'] - said['missing']} of {said['shards']}",
            "size": size(said["bytes"]),
            "modules": _modules(source, site),
        }
        for site, said in view["sites"].items()
    ]
    draw_rows(console, "sites", rows)
    partial = {site: said["present"] for site, said in view["sites"].items() if said["missing"]}
    if partial:
        draw_text(console, "what is there, from the first token to the last: █ all, ░▒▓ a part, · nothing")
        for site, present in partial.items():
            draw_text(console, site, "bold")
            draw_text(console, f"  {strip(present, console.width - 2)}")


def _origin(source: dict[str, Any]) -> dict[str, str]:
    """Say where a store's data came from, whatever a stranger's file says of it."""
    record, identity, numerics, corpus = (_dict(source.get(name)) for name in _ORIGIN)
    pairs: dict[str, str] = {}
    if "tokenizer" in identity:
        pairs["tokenizer"] = _short(identity["tokenizer"])
    if "model" in identity:
        revision = record.get("revision") or f"weights {_short(identity.get('weights'))}"
        pairs |= {
            "model": f"{record.get('name') or identity.get('model')} ({identity.get('model')}, {revision}), "
            f"computed in {identity.get('compute_dtype')}",
            "corpus": f"{corpus.get('documents')} documents, {_short(corpus.get('sha256'))}{_framed(corpus)}",
            "contexts": f"up to {identity.get('context_length')} tokens, "
            f"{'packed' if identity.get('pack') else 'by document'}, BOS {identity.get('bos', 'auto')}",
            "numerics": ", ".join(f"{name} {value}" for name, value in numerics.items()),
            "made": f"{record.get('made')}, mmcache {record.get('mmcache')}",
        }
    if record.get("command"):
        command = str(record["command"])
        pairs["command"] = command if len(command) <= _COMMAND else f"{command[:_COMMAND]}…"
    return pairs


def _framed(corpus: dict[str, Any]) -> str:
    framed = corpus.get("framed")
    return f", {framed} of them bring special tokens of their own (not doubled)" if framed else ""


_ORIGIN = ("record", "identity", "numerics", "tokenised")


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _short(digest: object) -> str:
    return str(digest or "")[:12]


def _modules(source: dict[str, Any], site: str) -> str:
    modules = _dict(source.get("modules")).get(site)
    if not isinstance(modules, list) or not modules:
        return ""
    return f"{modules[0]} …" if len(modules) > 1 else str(modules[0])


def draw_survey(console: Console, survey: Survey) -> None:
    """Draw what a job will take."""
    pairs = {
        "tokens": f"{survey.tokens:,} in {survey.sequences:,} contexts, {survey.batch_size} a batch",
        "sites": ", ".join(f"{site} [{width}]" for site, width in survey.sites.items())
        + f" in {len(survey.layers)} layers ({ranges(survey.layers)})",
        "a token": f"{survey.bytes_a_token:,} bytes ({survey.dtype}, layout {survey.layout})",
        "total": f"{size(survey.total_bytes)} in {survey.shards} shards",
        "to do": f"{size(survey.bytes_to_do)} in {survey.shards_to_do} shards, {survey.tokens_to_do:,} tokens",
        "free": size(survey.free_bytes) + ("" if survey.bytes_to_do <= survey.free_bytes else "  NOT ENOUGH"),
    }
    if survey.staging is not None:
        # There less is enough, and the bucket does not say how much it takes.
        pairs["free"] = f"{size(survey.free_bytes)} in {survey.staging}, where shards wait to be sent"
    if survey.framed:
        pairs["special"] = f"{survey.framed:,} documents bring special tokens of their own (not doubled)"
    if survey.seconds is not None and survey.tokens_a_second is not None:
        pairs["time"] = f"about {duration(survey.seconds)}, at {survey.tokens_a_second:,.0f} tokens/s"
    draw_pairs(console, "plan", pairs)


def draw_exported(console: Console, done: Exported) -> None:
    """Draw what an export made."""
    pairs = {
        "files": f"{done.files:,}, listed in index.json",
        "linked": f"{size(done.linked_bytes)}: the store's own files, not to be edited",
        "written": size(done.written_bytes),
    }
    draw_pairs(console, str(done.path), pairs)


def draw_report(console: Console, report: Report) -> None:
    """Draw what `verify` found."""
    pairs = {
        "looked at": f"{report.shards:,} shards, {size(report.bytes)} of them read ({report.level})",
        "findings": f"{len(report.findings):,}" if report.findings else "none",
    }
    draw_pairs(console, report.path, pairs)
    _draw_findings(console, report.findings)


def _draw_findings(console: Console, findings: Sequence[Finding]) -> None:
    draw_lines(console, [f"{finding.kind}: {finding.file}: {finding.what}" for finding in findings])


def draw_repaired(console: Console, done: Repaired) -> None:
    """Draw what `repair` did."""
    pairs = {
        "findings": f"{len(done.report.findings):,}" if done.report.findings else "none",
        "set aside": f"{len(done.aside):,} files, in .set-aside",
        "written anew": ", ".join(done.rewritten) or "nothing",
    }
    draw_pairs(console, done.report.path, pairs)
    lines = []
    for loss in done.lost:
        layers = f"layer {loss.layers[0]}" if len(loss.layers) == 1 else f"{len(loss.layers)} layers"
        first, last = loss.sequences or ("?", "?")
        said = f"{loss.site}, {layers}, tokens {loss.tokens[0]} to {loss.tokens[1] - 1} (sequences {first} to {last})"
        lines.append(f"missing now: {said}")
    draw_lines(console, lines)
    if done.lost and done.remade_by_extract:
        draw_text(console, "The same `mmcache extract` that made the store makes them again.")
    elif done.lost:
        draw_text(console, "They are lost without a copy; partial=True opens the rest.")
    if done.left:
        draw_text(console, "To be restored from a copy:")
        _draw_findings(console, done.left)
