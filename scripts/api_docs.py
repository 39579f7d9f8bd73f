"""Write docs/api.md, the reference of every public name, from signatures and docstrings.

Usage: .venv/bin/python scripts/api_docs.py          (tests/house/test_api_docs.py fails while the page is out of date)

Names are listed where users import them, so moving a module changes nothing here.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import griffe

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
MODULES = {
    "mmcache": "The package itself.",
    "mmcache.view": "Looking into a store; [looking.md](looking.md) shows these in use.",
    "mmcache.cluster": "Extraction on a Ray cluster; [clusters.md](clusters.md) shows it in use.",
    "mmcache.loading": "Models and tokenizers by name.",
}
_HEAD = """# Reference

<!-- Written by scripts/api_docs.py from the docstrings: change those, then run it again. -->

Every public name, with its signature and docstring. Whatever is not listed here is private and may change.
"""
_SPECIAL = ("__getitem__", "__len__", "__iter__", "__contains__")
_WIDTH = 100
_TITLES = {griffe.DocstringSectionKind.parameters: "Arguments"}


def page() -> str:
    """The text of docs/api.md."""
    tree = cast("griffe.Module", griffe.load("mmcache", search_paths=[ROOT]))
    public = {name for path in MODULES for name in importlib.import_module(path).__all__}
    parts = [_HEAD]
    for path, about in MODULES.items():
        module = importlib.import_module(path)
        groups: dict[str, list[str]] = {"Functions": [], "Classes": [], "Errors": [], "Other": []}
        for name in sorted(module.__all__, key=str.lower):
            groups[_group(getattr(module, name))].append(name)
        parts.append(f"## {path}\n\n{about}\n")
        for title, names in groups.items():
            parts += [f"### {title}\n"] if names and title == "Errors" else []
            parts += [_entry(tree, module, f"{path}.{name}", name, public) for name in names]
    return "\n".join(parts).rstrip("\n") + "\n"


def _group(value: object) -> str:
    if inspect.isclass(value):
        return "Errors" if issubclass(value, Exception) else "Classes"
    return "Functions" if callable(value) else "Other"


def _entry(tree: griffe.Module, module: Any, path: str, name: str, public: set[str]) -> str:
    value = getattr(module, name)
    if inspect.ismodule(value):
        return f"### {path}\n\nA module: see [below](#{value.__name__.replace('.', '')}).\n"
    if not callable(value):
        return f"### {path}\n\n{_constant(tree, module, name)}\n"
    # The class or function is read where it is defined; the page lists it where users import it.
    found = tree[f"{value.__module__}.{value.__qualname__}".removeprefix("mmcache.")]
    if _group(value) == "Errors":
        bases = ", ".join(base for base in _bases(value, public) if base != "Exception")
        return f"- **`{name}`** ({bases or 'Exception'}): {_first_paragraph(found)}"
    if isinstance(found, griffe.Class):
        return "\n".join(_class(found, path))
    return f"### {path}\n\n{_signature(cast('griffe.Function', found), path)}\n\n{_docstring(found)}\n"


def _constant(tree: griffe.Module, module: Any, name: str) -> str:
    found = tree[f"{module.__name__}.{name}".removeprefix("mmcache.")]
    return _docstring(found) or f"`{name} = {found.value}`"


def _bases(value: type, public: set[str]) -> list[str]:
    """The bases that a user knows: public and built-in ones."""
    return [base.__name__ for base in value.__bases__ if base.__name__ in public or hasattr(builtins, base.__name__)]


def _class(found: griffe.Class, path: str) -> Iterator[str]:
    yield f"### {path}\n"
    # Functions return readers and writers; the arguments of their constructors are private.
    text = _docstring(found)
    if "Made by" not in text and "__init__" in found.members:
        yield _signature(_function(found["__init__"]), path) + "\n"
    yield f"{text}\n"
    # The class's own names come last, since they may override inherited ones.
    members = {**found.inherited_members, **found.members}
    described = [member for name, member in sorted(members.items()) if _shown(name, member)]
    values = [_value(member) for member in described if not member.is_function]
    if values:
        yield "\n".join(values) + "\n"
    for function in (_function(member) for member in described if member.is_function):
        yield f"#### {found.name}.{function.name}\n\n{_signature(function, function.name)}\n\n{_docstring(function)}\n"


def _shown(name: str, member: griffe.Object | griffe.Alias) -> bool:
    public = name in _SPECIAL or not name.startswith("_")
    return public and member.docstring is not None and not member.is_class


def _function(member: griffe.Object | griffe.Alias) -> griffe.Function:
    return cast("griffe.Function", member.final_target if isinstance(member, griffe.Alias) else member)


def _value(member: griffe.Object | griffe.Alias) -> str:
    """A property or attribute in one line; the errors that it raises are left to its docstring."""
    text = _docstring(member).split("\n\nRaises:")[0]
    return f"- `{member.name}`: {' '.join(text.split())}"


def _signature(function: griffe.Function, name: str) -> str:
    """A call with its parameters, on one line if it fits, else one line per parameter."""
    shown, before = [], None
    for parameter in function.parameters:
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is griffe.ParameterKind.keyword_only and before is not griffe.ParameterKind.keyword_only:
            shown += [] if before is griffe.ParameterKind.var_positional else ["*"]
        before = parameter.kind
        shown.append(_parameter(parameter))
    returns = f" -> {function.returns}" if function.returns and function.name != "__init__" else ""
    line = f"{name}({', '.join(shown)}){returns}"
    if len(line) > _WIDTH:
        line = f"{name}(\n" + "".join(f"    {one},\n" for one in shown) + f"){returns}"
    return f"```text\n{line}\n```"


def _parameter(parameter: griffe.Parameter) -> str:
    stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}
    prefix = stars.get(parameter.kind) if parameter.kind else None
    text = (prefix or "") + parameter.name
    if parameter.annotation is not None:
        text += f": {parameter.annotation}"
    if parameter.default is None or prefix:
        return text
    return f"{text} = {parameter.default}" if parameter.annotation is not None else f"{text}={parameter.default}"


def _docstring(found: griffe.Object | griffe.Alias) -> str:
    """A docstring as Markdown: its text, and lists of arguments, attributes and errors."""
    if found.docstring is None:
        return ""
    parts = []
    for section in found.docstring.parse("google", warnings=False):
        if section.kind is griffe.DocstringSectionKind.text:
            parts.append(str(section.value))
            continue
        items = [f"- {_item(item)}" for item in section.value]
        parts.append(f"{_TITLES.get(section.kind, section.kind.value.title())}:\n\n" + "\n".join(items))
    return "\n\n".join(parts)


def _item(item: Any) -> str:
    label = getattr(item, "name", None) or str(item.annotation).strip("()")
    return f"`{label}`: {' '.join(item.description.split())}"


def _first_paragraph(found: griffe.Object | griffe.Alias) -> str:
    return " ".join(_docstring(found).split("\n\n")[0].split())


if __name__ == "__main__":
    PAGE.write_text(page())
