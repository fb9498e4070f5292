"""ATen graphs, tidied: which nodes share memory, dead code, common terms, and the random ops to draw beforehand."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

aten = torch.ops.aten

# Without autograd these return their argument.
_SAME = {aten.detach.default, aten.alias.default, aten.lift.default}
_RESHAPES = {aten.expand.default, aten.view.default, aten._unsafe_view.default}
# These read the shape, dtype and device of their tensor, not its values.
LIKE = set(
    re.findall(
        r"\w+",
        """
        empty_like zeros_like ones_like full_like rand_like randn_like randint_like
        new_empty new_zeros new_ones new_full new_empty_strided
        """,
    )
)
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Facts(NamedTuple):
    """What is known of a node's value."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Any, *_: Any, **__: Any) -> Any:
        """The facts of a tensor, also in lists; other values are left."""
        if isinstance(x, (tuple, list)):
            return type(x)(cls.of(v) for v in x) if type(x) in (tuple, list) else x
        return cls(x.shape, tuple(x.stride()), x.dtype, x.device) if isinstance(x, Tensor) else x

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie row by row without gaps."""
        expected = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != expected:
                return False
            expected *= n
        return True

    @property
    def overlaps(self) -> bool:
        """Whether one number stands at two places, as in an expanded tensor."""
        return any(s == 0 and n > 1 for s, n in zip(self.strides, self.shape, strict=True))


def value(node: Any) -> Facts:
    """The facts of a node's value."""
    known = node.meta["val"]
    return known if isinstance(known, Facts) else Facts.of(known)


def name_of(node: Node) -> str:
    """The name of an ATen op without its overload, or ""."""
    return node.target.overloadpacket.__name__ if isinstance(node.target, OpOverload) else ""


def is_random(node: Node) -> bool:
    """Whether a node draws from a generator."""
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def sources(node: Node) -> list[Node]:
    """The nodes whose values a node's value is computed from."""
    return [] if name_of(node) in LIKE else node.all_input_nodes


def _nodes_in(args: Any) -> Iterator[Node]:
    if isinstance(args, Node):
        yield args
    elif isinstance(args, (tuple, list)):
        for a in args:
            yield from _nodes_in(a)


@cache
def _aliases(op: OpOverload) -> tuple[tuple[int, str, bool], ...]:
    """Place, name and whether it is written to, of the arguments whose memory an op may return or write to."""
    named = enumerate(op._schema.arguments)
    return tuple((i, a.name, bool(a.alias_info.is_write)) for i, a in named if a.alias_info is not None)


def _sharing(node: Node) -> list[tuple[Node, bool]]:
    """The arguments whose memory an op may return or write to; with each, whether it writes."""
    if node.target is operator.getitem:
        return [(n, False) for n in _nodes_in(node.args[0])]
    if not isinstance(node.target, OpOverload):
        return []
    found = []
    for place, name, write in _aliases(node.target):
        given = node.args[place] if place < len(node.args) else node.kwargs.get(name)
        found += [(n, write) for n in _nodes_in(given)]
    return found


class Storages:
    """Which nodes of a graph share memory, which of that is written to, and which the caller gets."""

    def __init__(self, graph: Graph) -> None:
        self._parent: dict[Node, Node] = {n: n for n in graph.nodes}
        self.writes: dict[Node, list[Node]] = {}
        for node in graph.nodes:
            for argument, write in _sharing(node):
                self._parent[self.root(node)] = self.root(argument)
                if write:
                    self.writes.setdefault(node, []).append(argument)
        self.members: dict[Node, list[Node]] = {}
        for node in graph.nodes:
            self.members.setdefault(self.root(node), []).append(node)
        self.written = {self.root(n) for nodes in self.writes.values() for n in nodes}
        self.handed = {self.root(n) for n in output_of(graph).all_input_nodes}

    def root(self, node: Node) -> Node:
        """One node for all that share its memory."""
        parent = self._parent
        while (up := parent[node]) is not node:
            node = parent[node] = parent[up]
        return node

    def is_own(self, node: Node) -> bool:
        """Whether the node's memory is never written to, and never seen by the caller."""
        root = self.root(node)
        return root not in self.written and root not in self.handed


def output_of(graph: Graph) -> Node:
    """The node that returns."""
    return next(iter(reversed(graph.nodes)))


def replace(graph: Graph, node: Node, new: Node) -> None:
    """Put another node in the place of one."""
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def drop_same(graph: Graph) -> None:
    """Take out the ops that return their argument as it is: detach, alias, a view of the same shape."""
    for node in list(graph.nodes):
        if node.target in _SAME or (node.target in _RESHAPES and looks_like(value(node.args[0]), value(node))):
            replace(graph, node, node.args[0])


def looks_like(x: Facts, y: Facts) -> bool:
    """Whether two values have one shape, dtype and layout."""
    return (x.shape, x.dtype, x.strides) == (y.shape, y.dtype, y.strides)


def drop_dead(graph: Graph, *, draws: bool = False) -> None:
    """Take out what no output and no write to memory from outside needs; with `draws`, draws from generators too."""
    storages = Storages(graph)
    touched = {storages.root(n) for n in graph.nodes if n.op in ("placeholder", "get_attr")}
    live: set[Node] = set()
    for node in reversed(graph.nodes):
        written = {storages.root(a) for a in storages.writes.get(node, [])}
        if node.op == "output" or node in live or written & touched or (is_random(node) and not draws):
            live |= {node, *node.all_input_nodes}
            touched |= {storages.root(n) for n in node.all_input_nodes}
        elif node.op != "placeholder":
            graph.erase_node(node)


def writes_outside(graph: Graph) -> bool:
    """Whether a run changes its arguments, as a batch normalisation its running means."""
    storages = Storages(graph)
    outside = {storages.root(n) for n in graph.nodes if n.op in ("placeholder", "get_attr")}
    return bool(outside & storages.written) or any("batch_norm" in name_of(n) for n in graph.nodes)


def merge_common(graph: Graph) -> None:
    """Compute equal terms once: ops with equal arguments on memory that is never written to."""
    storages = Storages(graph)
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        pure = isinstance(node.target, OpOverload) or node.target is operator.getitem
        if not pure or is_random(node) or name_of(node) in _EMPTY or not storages.is_own(node):
            continue
        if any(storages.root(n) in storages.written for n in node.all_input_nodes):
            continue
        first = seen.setdefault((node.target, _key(node.args), _key(node.kwargs)), node)
        if first is not node:
            replace(graph, node, first)


def _key(args: Any) -> Any:
    """Arguments as a key: 1, 1.0 and True are three numbers to a tensor."""
    if isinstance(args, (tuple, list)):
        return tuple(_key(a) for a in args)
    if isinstance(args, dict):
        return tuple((k, _key(args[k])) for k in sorted(args))
    return args if isinstance(args, Node) else (type(args), repr(args))


def separate_outputs(graph: Graph) -> None:
    """Let no output share memory with an argument, a constant or another output, or hold one number at two places."""
    storages, output = Storages(graph), output_of(graph)
    taken = {storages.root(n) for n in graph.nodes if n.op in ("placeholder", "get_attr")}
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    for i, node in enumerate(results):
        if not isinstance(node, Node):
            continue
        out = value(node)
        if storages.root(node) in taken or out.overlaps:
            with graph.inserting_before(output):
                layout: dict[str, Any] = {"memory_format": torch.contiguous_format}
                results[i] = graph.call_function(aten.clone.default, (node,), layout)
            results[i].meta["val"] = Facts.of(torch.empty(out.shape, dtype=out.dtype, device="meta"))
        taken.add(storages.root(node))
    output.args = (results,)


def closed_nodes(graph: Graph) -> set[Node]:
    """The nodes whose value hangs on nothing from outside: literals, fills, draws of a fixed law, and their terms."""
    closed: set[Node] = set()
    for node in graph.nodes:
        literal = node.op == "get_attr" and node.meta.get("literal", False)
        if literal or (node.op == "call_function" and all(n in closed for n in sources(node))):
            closed.add(node)
    return closed


def random_to_hoist(graph: Graph) -> list[Node]:
    """The random ops that may be drawn before the graph runs, in its order.

    They end at the first op whose law hangs on a value of the graph, so that the order of draws stays as it was.
    """
    closed, storages = closed_nodes(graph), Storages(graph)
    found: list[Node] = []
    for node in (n for n in graph.nodes if is_random(n)):
        if node not in closed or not _fills_fresh(node, storages):
            break
        found.append(node)
    return found


def _fills_fresh(node: Node, storages: Storages) -> bool:
    """Whether a random op makes its own memory, or is the first to use the memory that it fills."""
    if node not in storages.writes:
        return True
    members = storages.members[storages.root(node)]
    before = set(members[: members.index(node)])
    return all(u is node or u in before for n in before for u in n.users) and not before & set(storages.writes)


def with_ancestors(nodes: Iterable[Node]) -> set[Node]:
    """Nodes and all that their values are computed from."""
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += sources(node)
    return found


def pin_shapes(graph: Graph) -> None:
    """Let `empty_like(x)` and its kin name their shape, dtype and device, so that they need x no more."""
    for node in [n for n in graph.nodes if name_of(n) in LIKE]:
        out = value(node)
        made = _maker(node, name_of(node), list(out.shape), list(out.strides))
        if made is None:
            continue
        with graph.inserting_before(node):
            new = graph.call_function(made[0], made[1], {"dtype": out.dtype, "device": out.device})
        new.meta.update(node.meta)
        replace(graph, node, new)


def _maker(node: Node, name: str, shape: list[int], strides: list[int]) -> tuple[OpOverload, tuple[Any, ...]] | None:
    """The op and the arguments that give what a *_like op gives; None where there is none."""
    if "empty" in name:
        return aten.empty_strided.default, (shape, strides)
    if not value(node).is_contiguous or name == "randint_like":
        return None
    if name in ("rand_like", "randn_like"):
        return (aten.rand if name == "rand_like" else aten.randn).default, (shape,)
    given = node.args[2 if name == "new_full" else 1] if "full" in name else float("one" in name)
    return None if isinstance(given, Node) else (aten.full.default, (shape, given))
