"""A parsed template is rewritten so that all it does without a call is paid for too (budget.py).

    {% for a in items %} body      {% for a in items | counted_items(1) %} {{ 30 | counted_body }} body
    {{ a }} text                   {{ a | counted_print }} {{ 4 | counted_text }} text
    a ~ b        a == b            [a, b] | counted_concat        a | counted_operand == b | counted_operand
    [a, b]  a[1:]  varargs         … | counted_value

The filters return what they are given; those for a body and a text (30: a tenth of its nodes, 4: its characters) return
nothing. A template that names them itself pays more, never less. Refused at once are recursive loops, autoescape blocks
and other files.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import TemplateSyntaxError
from jinja2.runtime import Context
from jinja2.visitor import NodeTransformer

from . import budget


class Counted(NodeTransformer):
    """Puts the counting into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise TemplateSyntaxError("recursive loops are not supported", node.lineno)
        turn = nodes.Const(1 + _cost([node.test] if node.test else []))
        self._body(node)
        node.iter = _filtered(node.iter, "counted_items", turn)
        return node

    def visit_Macro(self, node: Any) -> nodes.Node:
        return self._body(node)

    visit_CallBlock = visit_Block = visit_Macro

    def _body(self, node: Any) -> nodes.Node:
        """Each time that the body runs, its length is paid for."""
        cost = _cost(node.body)
        self.generic_visit(node)
        if cost:
            node.body.insert(0, nodes.Output([_filtered(nodes.Const(cost), "counted_body")], lineno=node.lineno))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        shown: list[nodes.Expr] = []
        for part in node.nodes:
            if isinstance(part, nodes.TemplateData):
                shown += [_filtered(nodes.Const(len(part.data)), "counted_text"), part]
            else:
                shown.append(_filtered(part, "counted_print"))
        node.nodes = shown
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes), "counted_concat")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = _filtered(node.expr, "counted_operand")
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, "counted_operand")
        return node

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _filtered(node, "counted_value")

    visit_Tuple = visit_Dict = visit_List

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "counted_value") if isinstance(node.arg, nodes.Slice) else node

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        arguments = node.ctx == "load" and node.name in ("varargs", "kwargs")
        return _filtered(node, "counted_value") if arguments else node

    def visit_Include(self, node: nodes.Node) -> nodes.Node:
        raise TemplateSyntaxError("other files cannot be read: there is no loader for this environment", node.lineno)

    visit_Import = visit_FromImport = visit_Extends = visit_Include

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> nodes.Node:
        raise TemplateSyntaxError("autoescape is not supported", node.lineno)


def _cost(body: list[Any]) -> int:
    return sum(1 for node in body for _ in node.find_all(nodes.Node)) // 10


def _filtered(node: Any, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _counter(count: Callable[..., Any]) -> Callable:
    """A filter that calls `count`."""

    @pass_context
    def counter(_context: Context, *args: Any) -> Any:
        return count(*args)

    return counter


def _items(items: Iterable, cost: int) -> Iterator:
    return budget.counted(items, max(1, int(cost)))


def _operand(value: Any) -> Any:
    budget.read(value)
    return value


def _print(value: Any) -> Any:
    budget.step()
    return budget.made(value)


def _nothing(count: Callable[[int], None]) -> Callable[[int], str]:
    def counted(amount: int) -> str:
        count(max(0, int(amount)))
        return ""

    return counted


COUNTERS = {
    "counted_items": _counter(_items),
    "counted_value": _counter(budget.made),
    "counted_operand": _counter(_operand),
    "counted_print": _counter(_print),
    "counted_concat": _counter(lambda parts: _print(budget.join("", parts))),
    "counted_text": _counter(_nothing(budget.pay)),
    "counted_body": _counter(_nothing(budget.step)),
}
