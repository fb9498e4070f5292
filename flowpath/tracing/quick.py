"""ATen graphs made quick to run op by op: constants computed once, neutral ops dropped, short calls."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from flowpath.tracing.graphs import (
    LIKE,
    Storages,
    aten,
    closed_nodes,
    drop_dead,
    is_random,
    looks_like,
    merge_common,
    name_of,
    output_of,
    replace,
    sources,
    value,
)

# Python's own bindings of these take the arguments of the ATen ops, and half the time of a call by overload.
_BOUND = set(
    re.findall(
        r"\w+",
        """
        abs add addcdiv addcmul addmm amax amin atan2 baddbmm bmm cat ceil clamp clamp_min clamp_max cos cosh cumsum
        diagonal digamma div eq erf erfc exp expm1 flip floor gather ge gt index_select isfinite isinf isnan le lgamma
        log log10 log1p log2 logical_and logical_not logical_or logsumexp lt masked_fill maximum mean minimum mm mul
        mv ne neg permute polygamma pow reciprocal relu remainder rsqrt rsub scatter select sigmoid sign sin sinh sqrt
        square squeeze stack sub sum t tan tanh transpose tril triu trunc unbind unsqueeze where xlogy
        """,
    )
)
_METHODS = {"view", "expand", "masked_fill_", "mul_", "add_", "copy_"}
_KEYWORDS = {"alpha", "beta", "value", "rounding_mode", "dim", "keepdim"}
_NEUTRAL = {"mul": (1, True), "div": (1, False), "add": (0, True), "sub": (0, False), "pow": (1, False)}
_TRANSPOSES = {aten.t.default, aten.view.default}


def quickened(module: GraphModule) -> Callable[..., list[Any]]:
    """The function of a graph's arguments that runs it op by op, quickly."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    constants = {str(n.target): getattr(module, str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    fold(graph, constants)
    drop_neutral(graph)
    join_views(graph)
    merge_common(graph)
    drop_dead(graph)
    call_short(graph)
    return GraphModule(constants, graph).forward


def fold(graph: Graph, constants: dict[str, Tensor]) -> None:
    """Compute once what hangs on nothing from outside. Not what is random, written to, or handed to the caller.

    Args:
        graph: the graph; it gets `get_attr` nodes for what was computed.
        constants: its constants by name; what was computed is added.
    """
    closed, storages = closed_nodes(graph), Storages(graph)
    values: dict[Node, Any] = {}
    for node in graph.nodes:
        if node not in closed or is_random(node) or not storages.is_own(node) or name_of(node) in LIKE:
            continue
        if node.op == "get_attr":
            values[node] = constants[str(node.target)]
        elif all(n in values for n in sources(node)):
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    for node, held in values.items():
        if node.op != "get_attr" and isinstance(held, Tensor) and any(u not in values for u in node.users):
            name = f"folded_{node.name}"
            constants[name] = held
            with graph.inserting_before(node), catch_warnings():
                simplefilter("ignore")  # the graph has no module yet in which the name could be looked up
                new = graph.get_attr(name)
            new.meta.update(node.meta, literal=True, folded=held)
            node.replace_all_uses_with(new)
    drop_dead(graph)


def drop_neutral(graph: Graph) -> None:
    """x * 1, x / 1, x ** 1, x + 0 and x - 0 are x, where the constant neither widens x nor changes its type."""
    storages = Storages(graph)
    for node in list(graph.nodes):
        rule = _NEUTRAL.get(name_of(node))
        if rule is None or len(node.args) != 2 or node.kwargs or not storages.is_own(node):
            continue
        left, right = node.args
        kept = left if _all(right, rule[0]) else right if rule[1] and _all(left, rule[0]) else None
        if isinstance(kept, Node) and storages.is_own(kept) and looks_like(value(kept), value(node)):
            replace(graph, node, kept)


def _all(node: Any, number: float) -> bool:
    """Whether a number, or a constant tensor in all its elements, is this number."""
    held = node.meta.get("folded") if isinstance(node, Node) else node
    return held is not None and bool((held == number).all() if isinstance(held, Tensor) else held == number)


def join_views(graph: Graph) -> None:
    """t(t(x)) is x; a view of a view is one view, where one is enough."""
    for node in graph.nodes:
        source = node.args[0] if node.target in _TRANSPOSES else None
        if not isinstance(source, Node) or source.target is not node.target:
            continue
        first = source.args[0]
        if node.target is aten.view.default and value(first).is_contiguous:
            node.args = (first, *node.args[1:])
        elif node.target is aten.t.default:
            node.replace_all_uses_with(first)
    drop_dead(graph)


def call_short(graph: Graph) -> None:
    """Call common ops by their Python bindings: the same kernels."""
    output = output_of(graph)
    for node in graph.nodes:
        name = name_of(node)
        if node is output or not set(node.kwargs) <= _KEYWORDS:
            continue
        if name in _METHODS:
            node.op, node.target = "call_method", name
        elif name in _BOUND:
            node.target = getattr(torch, name)
