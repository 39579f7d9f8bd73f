"""A plan, printed on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmcache.cli.render import draw_pairs, draw_rows, draw_text
from mmcache.text import duration, size

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["draw", "spell"]

_MINUTE = 60


def spell(seconds: float) -> str:
    """A time for people, also a short one."""
    return f"{seconds:.3g} s" if seconds < _MINUTE else duration(seconds)


def draw(console: Console, said: dict[str, Any], *, sources: bool) -> None:
    """Print what `plan.py --json` prints."""
    model, store, writing, machine = said["model"], said["store"], said["writing"], said["machine"]
    draw_pairs(
        console,
        f"{model['name']}: {model['layers']} layers of {model['width']}, {model['parameters']:,} parameters",
        {
            "a token": f"{store['bytes_a_token']:,} bytes",
            "total": f"{store['bytes']:,} bytes ({size(store['bytes'])}) of {store['tokens']:,} tokens",
            "shards": f"{store['shards']:,} of up to {store['shard_tokens']:,} tokens, {size(store['shard_bytes'])}",
            "beside the rows": f"{size(store['overhead'])} in shards, {size(store['columns'])} of tokens, "
            f"{size(store['metadata'])} of metadata",
            "made by": f"{machine['workers']:,} workers, {machine['gpus']:,} GPUs, {machine['machines']:,} machines, "
            f"{machine['disks']:,} disks",
            "time": f"{spell(writing['seconds'])}; {writing['gpu_hours']:,.1f} GPU hours",
            "bottleneck": f"{writing['bottleneck']}, {writing['times']:.3g} times {writing['runner_up']}: "
            f"{writing['remedy']}",
        },
    )
    rows = [
        {"part": part["name"], "takes": spell(part["seconds"]), "when": part["phase"], "because": part["why"]}
        for part in writing["parts"]
    ]
    draw_rows(console, "what takes how long (of what is together, the longest counts)", rows)
    _draw_reading(console, said["reading"])
    if sources:
        figures = [{"figure": name, **{key: _short(one[key]) for key in one}} for name, one in said["figures"].items()]
        draw_rows(console, "figures", figures)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _draw_reading(console: Console, said: dict[str, Any]) -> None:
    memory = ", ".join(f"{name} {size(count)}" for name, count in said["memory"].items())
    draw_pairs(
        console,
        "reading",
        {
            f"{said['epochs']:g} epoch{'s' * (said['epochs'] != 1)}, shuffled": f"{spell(said['epochs_seconds'])}, "
            f"{said['tokens_a_second']:,.0f} tokens/s, limited by {said['bottleneck']}",
            "a record": size(said["record_bytes"]),
            "open": spell(said["open_seconds"]),
            "resume": f"{spell(said['resume_seconds'])}, from a state of {said['state_bytes']} bytes",
            "memory": memory,
            "files open": f"{said['files_open']}",
            "verify": f"quick {spell(said['verify_quick_seconds'])}, full {spell(said['verify_full_seconds'])}",
        },
    )
    if not said["one_tensor"]:
        draw_text(
            console,
            f"{size(said['address_bytes'])} do not fit into the address space of one process: rows are read shard by "
            f"shard, many times slower. Open parts of it, or make several stores.",
            "bold",
        )
