"""A source file of Firebox, seen by what it imports, calls and mentions. Nothing is imported; only the text
is parsed."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property

FREE = ("firebox", "firebox.__version__")  # the package itself imports nothing


@dataclass(frozen=True)
class File:
    """One source file; `path` is relative to src/firebox, as in "engine/loop.py"."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def module(self) -> str:
        """ "firebox.engine.loop"; a package is named without `__init__`."""
        parts = self.path.removesuffix(".py").split("/")
        return ".".join(["firebox", *parts]).removesuffix(".__init__")

    @property
    def room(self) -> str:
        """The first part after "firebox", or "" for firebox/__init__.py."""
        return [*self.module.split("."), ""][1]

    @cached_property
    def imports(self) -> list[tuple[int, str]]:
        """(line, dotted name) of everything imported by a statement. `from a import b` is "a.b"."""
        found: list[tuple[int, str]] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found += [(node.lineno, f"{self._from(node)}.{alias.name}") for alias in node.names]
        return found

    @cached_property
    def firebox_imports(self) -> list[tuple[int, str]]:
        """(line, dotted name) of everything of Firebox's own that is imported or reached through the name
        `firebox`."""
        found = [(line, name) for line, name in self.imports if within(name, "firebox")]
        inner = {id(node.value) for node in ast.walk(self.tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and id(node) not in inner and self._root(node) == "firebox":
                found.append((node.lineno, self._dotted(node) or ""))
        for line, function, arguments in self.calls:
            if function == "importlib.import_module" and arguments and within(arguments[0] or "", "firebox"):
                found.append((line, arguments[0] or ""))
            if function == "firebox.find.load" and arguments and arguments[0]:
                found.append((line, ".".join(["firebox", arguments[0], *arguments[1:2]]).rstrip(".")))
        return [(line, name) for line, name in found if name not in FREE]

    @cached_property
    def mentions(self) -> list[tuple[int, str]]:
        """(line, dotted name) of every import and of every name or attribute that an import leads to."""
        found = list(self.imports)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute | ast.Name) and (name := self._dotted(node)):
                found.append((node.lineno, name))
        return found

    @cached_property
    def calls(self) -> list[tuple[int, str, list[str]]]:
        """(line, dotted name, arguments) of each call of something imported; an argument that is no literal
        is ""."""
        return [
            (node.lineno, name, [_literal(argument) for argument in node.args])
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Call) and (name := self._dotted(node.func))
        ]

    @cached_property
    def strings(self) -> list[tuple[int, str]]:
        """(line, text) of every string but docstrings."""
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        return [
            (node.lineno, node.value)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        ]

    @cached_property
    def _aliases(self) -> dict[str, str]:
        """Local name → the dotted name it was imported as."""
        aliases = {"__import__": "__import__"}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    first = alias.name.split(".")[0]
                    aliases[alias.asname or first] = alias.name if alias.asname else first
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    aliases[alias.asname or alias.name] = f"{self._from(node)}.{alias.name}"
        return aliases

    def _from(self, node: ast.ImportFrom) -> str:
        """The module of a from-import, with the dots of a relative one resolved."""
        if node.level == 0:
            return node.module or ""
        package = self.module.split(".") if self.path.endswith("__init__.py") else self.module.split(".")[:-1]
        base = package[: len(package) - (node.level - 1)]
        return ".".join([*base, node.module] if node.module else base)

    def _root(self, node: ast.expr) -> str | None:
        """What the name at the very left of an attribute stands for."""
        while isinstance(node, ast.Attribute):
            node = node.value
        return self._aliases.get(node.id) if isinstance(node, ast.Name) else None

    def _dotted(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return self._aliases.get(node.id)
        if isinstance(node, ast.Attribute) and (base := self._dotted(node.value)):
            return f"{base}.{node.attr}"
        return None


def _literal(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def within(name: str, prefix: str) -> bool:
    """Is `name` the module `prefix` or something in it?"""
    return name == prefix or name.startswith(f"{prefix}.")


def import_graph(files: list[File]) -> dict[str, set[str]]:
    """Module → the modules it imports, each cut to the longest name that is a file."""
    modules = {file.module for file in files}
    graph: dict[str, set[str]] = {}
    for file in files:
        targets = {_longest(name, modules) for _, name in file.firebox_imports}
        graph[file.module] = {name for name in targets if name and name != file.module}
    return graph


def _longest(name: str, modules: set[str]) -> str:
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """One cycle as a path whose ends are equal, or None."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for target in sorted(graph.get(module, ())):
            if cycle := visit(target, [*path, module]):
                return cycle
        done.add(module)
        return None

    for module in sorted(graph):
        if cycle := visit(module, []):
            return cycle
    return None
