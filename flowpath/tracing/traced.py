"""Traced functions: a function's ATen graph, its own backward passes included, free of Pyro and autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from flowpath.tracing import graphs
from flowpath.tracing.compiler import validation_kept
from flowpath.tracing.plain import ONE_AT_A_TIME, cuda_indices, kept, plain_tensors
from flowpath.tracing.quick import quickened


class TracingError(RuntimeError):
    """A function that cannot be traced: the message says why."""


@dataclass(frozen=True)
class Constant:
    """A tensor with more than one element that a graph holds without having been told of it.

    Args:
        tensor: the tensor.
        literal: whether the function made it, of numbers that are now fixed.
    """

    tensor: Tensor
    literal: bool

    def told(self, names: Mapping[int, str]) -> str:
        """The constant in words, with its name where `names` has its id."""
        name = names.get(id(self.tensor), "a literal" if self.literal else "a tensor")
        return f"{name} {tuple(self.tensor.shape)}"


class Traced:
    """A function as one graph of ATen ops: `trace` makes it.

    Called, it takes what the function took: a pytree of the traced structure, with tensors of the traced shapes and
    dtypes. It runs without autograd; gradients that the function took itself (`torch.autograd.grad`) are part of it.

    Attributes:
        graph: the graph; its arguments are the input tensors, then `held`, then the noise.
        held: tensors that the function reached without being given them: parameters, buffers, data in closures. They
            are read at each call, so steps of an optimiser and other writes in place are seen.
        constants: held tensors that were not announced as `live`, and literals, of more than one element: another
            tensor under the same name would not be seen.
        random: names of the random ops inside, whose law hangs on a value. All others are drawn before a call.
    """

    def __init__(
        self, module: GraphModule, spec: Any, held: list[Tensor], noise: GraphModule | None, writes: bool
    ) -> None:
        self._module, self.graph, self.held = module, module.graph, held
        self._spec, self._draw = spec, noise
        self.constants: tuple[Constant, ...] = ()
        self.random: tuple[str, ...] = ()
        self._inputs: list[Any] = []
        self._out: Any = None
        self._quick = quickened(module)
        # Where nothing outside is written to, the graph runs below autograd's bookkeeping of views and versions too.
        self._guard: Callable[[], Any] = torch.no_grad if writes else _below_autograd

    def __call__(self, *inputs: Any) -> Any:
        """What the function returns, a pytree of tensors."""
        leaves, spec = pytree.tree_flatten(inputs)
        if spec != self._spec:
            raise ValueError(f"Traced expects {_line(self._spec)}, got {_line(spec)}: trace the function again")
        self._check(leaves)
        results = self.run([x for x in leaves if isinstance(x, Tensor)])
        return pytree.tree_unflatten(results, self._out)

    def _check(self, leaves: Sequence[Any]) -> None:
        for got, expected in zip(leaves, self._inputs, strict=True):
            if describe(got) != expected:
                raise ValueError(f"Traced expects {expected}, got {describe(got)}: trace the function again")

    def module(self) -> GraphModule:
        """The graph as a module that torch.vmap can follow: of the input tensors, then `held`, then the noise."""
        self._module.recompile()
        return self._module

    @property
    def is_random(self) -> bool:
        """Whether a call draws from a generator."""
        return self._draw is not None or bool(self.random)

    def noise(self) -> list[Tensor]:
        """The draws of one call, from torch's global generator, in the order in which the function makes them."""
        return [] if self._draw is None else self._draw.forward()

    def run(self, inputs: list[Tensor]) -> list[Any]:
        """The flat results for the flat input tensors: unchecked, for loops."""
        noise = self.noise()
        with self._guard():
            return self._quick(*inputs, *self.held, *noise)

    def compiled(self, inputs: Sequence[Tensor]) -> Callable[[list[Tensor]], list[Any]]:
        """`run` through torch's inductor: C++ on a CPU, Triton and CUDA graphs on a GPU.

        Compiles now, for a function of these inputs. Raises whatever the compiler raises.
        """
        options: dict[str, Any] = {"fallback_random": bool(self.random)}
        devices = cuda_indices([*inputs, *self.held])
        if devices:
            options["triton.cudagraphs"] = not self.random
        with ONE_AT_A_TIME, torch.no_grad(), validation_kept(), torch.random.fork_rng(devices), catch_warnings():
            simplefilter("ignore")  # of torch about torch
            given: list[Any] = [x.detach() for x in (*inputs, *self.held, *self.noise())]
            self._module.recompile()
            call = torch._inductor.compile(self._module, given, options=options)
            with kept([*inputs, *self.held]):
                call(*given)

        def run(inputs: list[Tensor]) -> list[Any]:
            with torch.no_grad():
                return list(call(*inputs, *self.held, *self.noise()))

        return run


def trace(
    fn: Callable[..., Any], example_inputs: Sequence[Any], *, live: Iterable[Tensor] = (), same_noise: bool = True
) -> Traced:
    """Record what a function does to tensors, `torch.autograd.grad` inside it included, as one graph of ATen ops.

    The function is run once, with validation of distributions off; torch's generator and `live` tensors are put back.
    Its control flow is recorded as it went: it may hang on shapes and on arguments that are no tensors, and where it
    hangs on a tensor's value an error says so. Random ops whose law is fixed are taken out of the graph and drawn
    before each call, from torch's global generator in the same order, so that a call consumes the noise that the
    function would.

    Args:
        fn: takes `*example_inputs`, returns a pytree of tensors.
        example_inputs: pytrees of tensors and of other values; the latter become part of the graph.
        live: tensors that fn reaches by itself and that may change in place: parameters, buffers.
        same_noise: whether draws that nothing uses are made too, so that the generator goes on as after fn.

    Raises:
        TracingError: fn's control flow hangs on a tensor's value, or it does something that has no graph.

    Example:
        >>> import torch
        >>> from flowpath.tracing import trace
        >>> w = torch.ones(3, requires_grad=True)
        >>> def slope(x):
        ...     return torch.autograd.grad((w * x + torch.randn(3)).square().sum(), w)[0]
        >>> traced = trace(slope, [torch.zeros(3)], live=[w])
        >>> x = torch.arange(3.0)
        >>> with torch.random.fork_rng():
        ...     seed = torch.manual_seed(0)
        ...     expected = slope(x)
        ...     seed = torch.manual_seed(0)
        ...     bool(torch.equal(traced(x), expected))
        True
    """
    leaves, spec = pytree.tree_flatten(tuple(example_inputs))
    inputs = [x for x in leaves if isinstance(x, Tensor)]
    # An object given twice, or given and live, has two roles; an alias of it keeps them apart.
    known = _distinct(live)
    stand_ins = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    outputs: list[Any] = []

    def flat(stand_ins: list[Tensor], known: list[Tensor]) -> list[Any]:
        tensors = iter(stand_ins)
        given = pytree.tree_unflatten([next(tensors) if isinstance(x, Tensor) else x for x in leaves], spec)
        results, out = pytree.tree_flatten(fn(*given))
        outputs.append(out)
        return results

    with kept(known), torch.random.fork_rng(cuda_indices([*inputs, *known])), plain_tensors():
        try:
            recorded = make_fx(flat, tracing_mode="real")(stand_ins, known)
        except Exception as error:
            raise TracingError(_reason(error)) from error
    traced = _finish(recorded, spec, known, len(inputs), same_noise)
    traced._inputs, traced._out = [describe(x) for x in leaves], outputs[-1]
    return traced


def _finish(recorded: GraphModule, spec: Any, known: list[Tensor], num_inputs: int, same_noise: bool) -> Traced:
    """Turn a recorded graph into one with all tensors as arguments and without what is not needed."""
    graph = recorded.graph
    graph.set_codegen(torch.fx.graph.CodeGen())
    held, constants = _hold(recorded, known)
    graphs.drop_dead(graph, draws=not same_noise)
    for tidy in (graphs.drop_same, graphs.pin_shapes, graphs.drop_dead, graphs.merge_common, graphs.drop_dead):
        tidy(graph)
    graphs.separate_outputs(graph)
    noise = _hoist(recorded)
    used = [n for n in graph.nodes if n.op == "placeholder"][num_inputs : num_inputs + len(held)]
    for node in used:
        if not node.users:
            graph.erase_node(node)
    held = [x for x, node in zip(held, used, strict=True) if node.users]
    traced = Traced(recorded, spec, held, noise, graphs.writes_outside(graph))
    traced.constants = tuple(constants)
    traced.random = tuple(dict.fromkeys(graphs.name_of(n) for n in graph.nodes if graphs.is_random(n)))
    return traced


def _hold(module: GraphModule, known: list[Tensor]) -> tuple[list[Tensor], list[Constant]]:
    """Make every tensor that the graph holds an argument of it, but for literals; describe those that are baked in."""
    graph, held = module.graph, list(known)
    constants: list[Constant] = []
    after = [n for n in graph.nodes if n.op == "placeholder"][-1:]
    memory = {x.untyped_storage().data_ptr() for x in known}
    arguments: dict[int, Node] = {}
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        tensor = getattr(module, str(node.target))
        literal = all(u.target is graphs.aten.lift_fresh_copy.default for u in node.users)
        new = tensor.untyped_storage().data_ptr() not in memory and id(tensor) not in arguments
        if tensor.numel() > 1 and new:
            constants.append(Constant(tensor, literal))
        if literal:
            node.meta["literal"] = True
            continue
        if id(tensor) not in arguments:
            with graph.inserting_after(after[-1]) if after else graph.inserting_before(node):
                argument = graph.placeholder(f"held_{len(held)}")
            argument.meta.update(node.meta)
            after = [argument]
            arguments[id(tensor)] = argument
            held.append(tensor)
        node.replace_all_uses_with(arguments[id(tensor)])
        graph.erase_node(node)
    return held, constants


def _hoist(module: GraphModule) -> GraphModule | None:
    """Move the random ops of fixed law into a graph of their own, whose results become arguments."""
    graph = module.graph
    draws = graphs.random_to_hoist(graph)
    if not draws:
        return None
    moved = graphs.with_ancestors(draws)
    own, copies = Graph(), dict[Node, Node]()
    for node in graph.nodes:
        if node in moved:
            copies[node] = own.node_copy(node, lambda n: copies[n])
    drawn = [n for n in graph.nodes if n in moved and any(u not in moved for u in n.users)]
    own.output([copies[n] for n in drawn])
    after = [n for n in graph.nodes if n.op == "placeholder"][-1:]
    for i, node in enumerate(drawn):
        with graph.inserting_after(after[-1]) if after else graph.inserting_before(next(iter(graph.nodes))):
            argument = graph.placeholder(f"noise_{i}")
        argument.meta.update(node.meta)
        after = [argument]
        node.replace_all_uses_with(argument, delete_user_cb=lambda u: u not in moved)
    for node in reversed([n for n in graph.nodes if n in moved]):
        if not node.users:
            graph.erase_node(node)
    graphs.drop_dead(graph)
    return GraphModule(module, own)


_below_autograd: Callable[[], Any] = getattr(torch._C, "_AutoDispatchBelowAutograd", torch.no_grad)


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(x): x for x in tensors}.values())


def describe(x: Any) -> Any:
    """What has to be the same for a graph to fit: shape, dtype and device of a tensor, else the value."""
    return (tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else x


def _line(spec: Any) -> str:
    return " ".join(str(spec).split())


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if "get value out of a tracing tensor" in text:
        return "control flow or a number that hangs on the value of a tensor"
    return f"{type(error).__name__}: {next(iter(text.splitlines()), '')}"
