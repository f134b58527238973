"""All mutants of a file: mutmut's operators, where a mutant can matter."""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

_SENTENCE = m.MatchRegex(r"(?s).*\s.*")
_TEXT = m.OneOf(  # for people: strings with a space in them
    m.SimpleString(value=_SENTENCE),
    m.FormattedString(parts=[m.ZeroOrMore(), m.FormattedStringText(value=_SENTENCE), m.ZeroOrMore()]),
    m.ConcatenatedString(),
)
_TYPES = m.OneOf(*map(m.Name, ("Annotated", "Callable", "Literal", "Mapping", "Union", "dict", "list", "tuple")))
_LEFT_OUT = m.OneOf(
    _TEXT,
    m.Annotation(),
    m.Import(),
    m.ImportFrom(),
    m.Expr(value=m.SimpleString()),  # a docstring
    m.Raise(),
    m.Call(func=m.Name(value=m.MatchRegex(r".*(Error|Warning)"))),
    m.Call(func=m.Attribute(value=m.OneOf(m.Name("logger"), m.Name("logging"), m.Name("warnings")))),
    m.If(test=m.Name("TYPE_CHECKING")),
    m.Assign(targets=[m.AssignTarget(target=m.Name("__all__"))]),
    m.Assign(value=m.Subscript(value=_TYPES)),  # the name of a type
    m.Assign(value=m.Call(func=m.Name("TypeVar"))),
)


@dataclass(frozen=True)
class Mutant:
    """One change of a file.

    Attributes:
        line: Where.
        module: The file.
        node: What is replaced.
        replacement: By what.
    """

    line: int
    module: cst.Module
    node: cst.CSTNode
    replacement: cst.CSTNode

    def code(self) -> str | None:
        """The whole changed file; None if it is none: not Python, or not changed."""
        changed = self.module.deep_replace(self.node, self.replacement)
        code = changed.code if isinstance(changed, cst.Module) else ""
        try:
            compile(code, "mutant", "exec")
        except SyntaxError:
            return None
        return None if code == self.module.code else code


def find(source: str) -> list[Mutant]:
    """Mutants of everything but annotations, imports, docstrings, texts for people, and code for type checkers."""
    finder = _Finder()
    MetadataWrapper(cst.parse_module(source)).visit(finder)
    return finder.found


class _Finder(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Mutant] = []

    def visit_Module(self, node: cst.Module) -> None:  # noqa: N802  libcst's name
        self._module = node

    def on_visit(self, node: cst.CSTNode) -> bool:
        if m.matches(node, _LEFT_OUT):
            return False
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                for replacement in operator(node):
                    if not _loses_text(node, replacement):
                        line = self.get_metadata(PositionProvider, node).start.line
                        self.found.append(Mutant(line, self._module, node, replacement))
        return super().on_visit(node)


def _loses_text(node: cst.CSTNode, replacement: cst.CSTNode) -> bool:
    """Whether a call without one of its arguments, or with None in its place, is one without a text for people."""
    if not (isinstance(node, cst.Call) and isinstance(replacement, cst.Call)):
        return False
    return any(m.matches(arg.value, _TEXT) for arg in node.args if arg not in replacement.args)
