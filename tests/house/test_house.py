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

# Which packages a package may import. Each knows only those above it, and of those no more than it needs: `write`,
# `ops`, `training` and `view` stand beside each other over `read`.
MAY_IMPORT = {
    "urls": set(),
    "errors": {"urls"},
    "text": set(),
    "system": {"errors", "urls"},
    "format": {"errors", "system"},
    "storage": {"errors", "urls", "system", "format"},
    "stats": {"errors", "system", "format", "storage"},
    "read": {"errors", "text", "system", "format", "storage", "stats"},
    "write": {"errors", "system", "format", "storage", "stats", "read"},
    "models": {"errors", "system"},
    "extraction": {"errors", "urls", "system", "format", "storage", "stats", "read", "write", "models"},
    "cluster": {"errors", "system", "format", "storage", "read", "models", "extraction"},
    "training": {"errors", "system", "format", "read"},
    "ops": {"errors", "system", "format", "storage", "stats", "read"},
    "view": {"errors", "text", "system", "format", "storage", "stats", "read", "models"},
    "cli": {"errors", "urls", "text", "system", "storage", "read", "models", "extraction", "cluster", "ops", "view"},
    "loading": {"models"},
    "__main__": {"cli"},
}  # fmt: skip
# Packages whose `__init__` is more than a docstring: what users import from it.
FRONT_DOORS = {"view", "cli", "cluster"}

# What is imported only when it is used.
LATE = {
    "transformers", "tokenizers", "datasets", "rich", "click", "plotly", "starlette", "uvicorn", "ray",
    "tensorstore", "pandas", "pyarrow", "h5py", "xarray", "numba",
    "torch",
}  # fmt: skip


def package_of(file):
    """The name in MAY_IMPORT: a package, or a module beside the packages."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(tree):
    """Every module of ours that a file imports, those inside functions and under TYPE_CHECKING too, with the line.

    Such as `("system", "files")`: the package, and the module in it.
    """
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import; write mmcache.…"
            names = [f"mmcache.{alias.name}" for alias in node.names] if node.module == "mmcache" else [node.module]
        for name in names:
            if name.split(".")[0] == "mmcache":
                yield node.lineno, tuple([*name.split("."), "__init__", "__init__"][1:3])


def test_every_package_has_its_place():
    assert {package_of(file) for file in FILES} - {"__init__"} == set(MAY_IMPORT)
    order = list(MAY_IMPORT)
    for package, known in MAY_IMPORT.items():
        assert known <= set(order[: order.index(package)]), package


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES])
def test_a_package_knows_only_those_that_it_may(file):
    own = package_of(file)
    if own == "__init__":
        return  # the front door knows all
    known = MAY_IMPORT[own] | {own}
    wrong = [f"line {line} imports {name}" for line, (name, _) in imports_of(TREES[file]) if name not in known]
    assert not wrong, f"{file.name}: {'; '.join(wrong)}, which {own} may not know"


@pytest.mark.parametrize("package", [name for name in MAY_IMPORT if (PACKAGE / name).is_dir()])
def test_imports_inside_a_package_go_one_way(package):
    """At run time: what is imported for its types alone may name each other."""
    late = {
        id(node)
        for file in FILES
        for branch in ast.walk(TREES[file])
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    needs = {}
    for file in FILES:
        if package_of(file) == package and file.stem != "__init__":
            tree = ast.Module(
                [
                    node
                    for node in ast.walk(TREES[file])
                    if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in late
                ],
                [],
            )
            needs[file.stem] = {module for _, (name, module) in imports_of(tree) if name == package} - {"__init__"}
    while needs:
        free = {name for name, wants in needs.items() if not wants & set(needs)}
        assert free, f"{sorted(needs)} import each other"
        needs = {name: wants for name, wants in needs.items() if name not in free}


@pytest.mark.parametrize("package", [name for name in MAY_IMPORT if (PACKAGE / name).is_dir()])
def test_a_package_imports_nothing_by_itself(package):
    if package not in FRONT_DOORS:
        body = TREES[PACKAGE / package / "__init__.py"].body
        assert len(body) == 1
        assert ast.get_docstring(TREES[PACKAGE / package / "__init__.py"])


def test_beside_the_packages_are_few_files():
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_the_import_check_sees_every_kind_of_import():
    text = """
from mmcache.read.store import Store
import mmcache.cli
import mmcache
from mmcache import write, open
if TYPE_CHECKING:
    from mmcache.write.cache import x
def f():
    import numpy, mmcache.extraction.plan as p
    class A:
        from mmcache.view.web import y
"""
    found = {name for _, (name, _) in imports_of(ast.parse(text))}
    assert found == {"read", "cli", "__init__", "write", "open", "extraction", "view"}


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


def test_no_module_hides_a_function_of_the_same_name():
    for name in mmcache.__all__:
        assert name in FRONT_DOORS or not (PACKAGE / name).exists(), name
        assert not (PACKAGE / f"{name}.py").exists(), name
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
