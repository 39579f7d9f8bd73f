"""The house rules that no linter knows: who may import whom, what an import costs, how long things get."""

import ast
import builtins
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmcache
from mmcache import errors

PACKAGE = Path(mmcache.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text()) for file in FILES}

# Each knows only those above it. A new module gets a place here: as high as what it imports allows.
ORDER = [
    "addresses", "errors", "refusals", "arguments", "beneath", "units", "html", "dtypes", "geometry", "format",
    "memory", "buffers", "page_cache",
    "dlpack", "syscalls", "descriptor", "held", "crew", "aio", "runs", "scatter", "direct", "window",
    "files", "local_objects", "connection", "retries", "object_names", "object_reads", "bucket",
    "draft", "lock", "claims", "cache_place", "copy_records",
    "shard_cache", "kernel", "sums", "statistics", "signed", "names", "features",
    "flags", "user_metadata", "manifest", "new_store",
    "listing", "landing", "shard_objects", "shard_bytes", "arriving", "listed", "metadata_copies", "mirror",
    "tokenizer_file", "bucket_listing", "bucket_folder", "shard_files",
    "shards", "shard_statistics", "site_statistics", "small_files", "summary", "devices", "positions",
    "shard_maps", "extents", "remote_rows", "checked_rows", "site_map", "row_pieces", "site_rows", "site_view",
    "together", "sequences", "token_arrays", "xarray_view", "store", "opening", "headers", "selection",
    "outbox", "export", "permutation", "split", "kept", "lanes", "order", "shares", "feed_plan", "read_ahead",
    "conversion", "training_batch", "fetcher", "batch_feed", "feed_options", "dataset", "findings", "shard_check",
    "uploads", "verify", "repair", "part", "places", "carrier", "sender", "receiver", "transfer", "pipeline",
    "shard_writer", "staging", "block", "columns", "grown", "batch", "writer", "layer_writer", "cache", "wrappers",
    "families", "sites", "panics", "model_use", "capture", "file_kinds", "corpus", "tokenizer_calls", "frame",
    "contexts", "loading", "weights",
    "model_identity", "provenance", "tokenise", "room", "outgoing", "settings", "ranks", "turns", "token_batches",
    "threads", "fill", "fingerprint", "plan_compare", "plan", "survey", "job", "extract", "cluster_worker",
    "cluster_pool", "ray_session", "cluster", "plain", "overview", "view", "visible", "tables", "heat", "terminal",
    "passages", "charts", "progress", "signals", "commands", "cli", "__main__",
]  # fmt: skip

# What is imported only when it is used.
LATE = {
    "transformers", "tokenizers", "datasets", "rich", "click", "plotly", "starlette", "uvicorn", "ray",
    "tensorstore", "pandas", "pyarrow", "h5py", "xarray", "numba",
    "torch",
}  # fmt: skip


def module_of(file):
    """The name in ORDER: a package, such as one for views, counts as one module."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(tree):
    """Every module of ours that a file imports, those inside functions and under TYPE_CHECKING too, with the line."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import; write mmcache.…"
            names = [f"mmcache.{alias.name}" for alias in node.names] if node.module == "mmcache" else [node.module]
        for name in names:
            if name.split(".")[0] == "mmcache":
                yield node.lineno, [*name.split("."), "__init__"][1]


def test_every_module_has_its_place():
    assert {module_of(file) for file in FILES} - {"__init__"} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES])
def test_a_module_knows_only_those_above_it(file):
    own = module_of(file)
    if own == "__init__":
        return  # the front door knows all
    above = ORDER[: ORDER.index(own) + (file.parent != PACKAGE)]
    wrong = [f"line {line} imports {name}" for line, name in imports_of(TREES[file]) if name not in above]
    assert not wrong, f"{file.name}: {'; '.join(wrong)}, which stands below it (or is the package itself)"


def test_the_import_check_sees_every_kind_of_import():
    text = """
from mmcache.read.store import Store
import mmcache.cli
import mmcache
from mmcache import writer, open
if TYPE_CHECKING:
    from mmcache.write.cache import x
def f():
    import numpy, mmcache.extraction.plan as p
    class A:
        from mmcache.view.web import y
"""
    found = {name for _, name in imports_of(ast.parse(text))}
    assert found == {"store", "cli", "__init__", "writer", "open", "cache", "plan", "view"}


def test_import_mmcache_stays_light():
    code = f"import sys, mmcache; print(*sorted({LATE!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_what_is_imported_late_is_what_is_said():
    seen = {}
    for node in ast.walk(TREES[PACKAGE / "__init__.py"]):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("mmcache."):
            seen |= {alias.asname or alias.name: node.module.removeprefix("mmcache.") for alias in node.names}
    seen.pop("register_bfloat16")
    assert seen == mmcache._PLACES
    assert {*seen, "cluster", "view"} == set(mmcache.__all__)


def test_a_function_is_not_hidden_by_the_module_it_is_in():
    code = (
        "import mmcache, mmcache.capture, mmcache.verify, importlib; importlib.import_module('mmcache.extract');"
        "print(*(callable(getattr(mmcache, name)) for name in ('capture', 'verify', 'extract', 'export', 'repair')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 5
    done = subprocess.run([sys.executable, "-c", "import mmcache; mmcache.view.health"], check=False)
    assert done.returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mmcache.nothing


def test_the_front_door_is_sorted_and_everything_in_it_is_documented():
    assert mmcache.__all__ == sorted(mmcache.__all__)
    assert len(set(mmcache.__all__)) == len(mmcache.__all__)
    undocumented = []
    for name in mmcache.__all__:
        thing = getattr(mmcache, name)
        undocumented += [name] * (not inspect.getdoc(thing))
        if inspect.isclass(thing):
            # Inherited ones count where they are ours.
            own = {member for kind in thing.__mro__ if kind.__module__.startswith("mmcache") for member in vars(kind)}
            members = [(member, inspect.getattr_static(thing, member)) for member in own if not member.startswith("_")]
            undocumented += [
                f"{name}.{member}"
                for member, value in members
                if (callable(value) or isinstance(value, (property, classmethod, staticmethod)))
                and not inspect.getdoc(value)
            ]
    assert undocumented == []


def test_every_error_is_at_the_front_door():
    assert set(errors.__all__) <= set(mmcache.__all__)
    classes = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    assert set(errors.__all__) == classes
    assert errors.__all__ == sorted(errors.__all__)


def test_the_error_tree_in_the_docstring_is_the_tree_of_the_classes():
    found, parents = {}, {-1: "Exception"}
    for line in errors.__doc__.splitlines():
        drawn = re.match(r"^((?:[│ ]   )*)(?:[├└]── )?([A-Z]\w+Error)(?: \((\w+)\))?", line)
        if drawn:
            depth = -1 if line.startswith("MmcacheError") else len(drawn[1]) // 4
            if depth >= 0:
                found[drawn[2]] = (parents[depth - 1] if depth else "MmcacheError", drawn[3])
            parents[depth] = drawn[2]
    assert set(found) == set(errors.__all__) - {"MmcacheError"}
    for name, (parent, builtin) in found.items():
        bases = getattr(errors, name).__bases__
        assert [base.__name__ for base in bases] == [parent, *([builtin] if builtin else [])], name


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_ours_and_a_builtin(name):
    kind = getattr(errors, name)
    assert issubclass(kind, errors.MmcacheError)
    ours = {getattr(errors, other) for other in errors.__all__}
    found = [base for base in kind.__mro__ if base not in ours and base is getattr(builtins, base.__name__, None)]
    assert found[0] is not Exception or name == "MmcacheError"
    assert str(kind("what happened")) == "what happened"


def test_no_file_is_too_long_to_be_read():
    lengths = {str(file.relative_to(PACKAGE)): len(file.read_text().splitlines()) for file in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > 600} == {}


def code_lines(function):
    """The lines of a function without its docstring: what a caller has to know takes the words that it takes."""
    documented = ast.get_docstring(function) is not None
    words = function.body[0].end_lineno - function.body[0].lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - words


def test_no_function_is_too_long_to_be_read():
    lengths = {
        f"{file.relative_to(PACKAGE)}: {node.name}": code_lines(node)
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert {name: lines for name, lines in lengths.items() if lines > 50} == {}
