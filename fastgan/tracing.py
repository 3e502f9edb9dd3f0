"""What a `forward` that somebody wrote by hand does, as a graph of torch.fx: where it is certain to do it again.

A graph stands for one way through the code. So the code may call layers and functions of torch, read tensors, and decide on
its arguments and on plain attributes: these are compared whenever the graph is to run. Code that reads, changes or asks for
anything else has no graph.
"""

import ast
import builtins
import inspect
import math
import operator
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


class Untraceable(Exception):
    """Why a forward is not certain to do again what it does now."""


# ── What the code may be made of ─────────────────────────────────────────────────────────────────────────────────────

_STATEMENTS = (ast.AnnAssign, ast.Assign, ast.AugAssign, ast.Expr, ast.For, ast.If, ast.Pass, ast.Return)
_EXCLUDED = (ast.Await, ast.Lambda, ast.NamedExpr, ast.Yield, ast.YieldFrom)
_BUILTINS = {"enumerate", "float", "int", "list", "max", "min", "range", "reversed", "slice", "sum", "tuple", "zip"}
_MODULES = (torch, F, math, operator)
# Functions of torch that tell of something else than their arguments, or do something else than return.
_ASKING = (
    "compile",
    "enable_",
    "get_",
    "has_",
    "inference_",
    "is_",
    "load",
    "manual_",
    "no_grad",
    "rand",
    "save",
    "set_",
    "use_",
)
_PLAIN = (bool, float, int, str, type(None), torch.device, torch.dtype)


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))


class _Reader:
    """Reads the code of a module's forward, and of the functions that it calls, before it is traced."""

    def __init__(self, module: nn.Module, kind: type[nn.Module]):
        self.module, self.kind = module, kind
        self.codes: set[CodeType] = set()
        self.read(kind.forward)

    def read(self, function: Any) -> None:
        if not isinstance(function, FunctionType) or function.__closure__ or hasattr(function, "__wrapped__"):
            raise Untraceable("its forward or what that calls is no plain function")
        if function.__code__ in self.codes:
            return
        self._note(function.__code__)
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        except (OSError, SyntaxError, TypeError, ValueError) as error:
            raise Untraceable("its forward has no source") from error
        if not isinstance(tree, ast.FunctionDef) or tree.decorator_list:
            raise Untraceable("its forward or what that calls is no plain function")
        names = function.__code__.co_varnames
        own = names[0] if function is getattr(self.kind, function.__name__, None) else None
        for node in (node for statement in tree.body for node in ast.walk(statement)):
            self._allow(node, function, own, set(names))

    def _note(self, code: CodeType) -> None:
        self.codes.add(code)
        for inner in code.co_consts:  # comprehensions
            if isinstance(inner, CodeType):
                self._note(inner)

    def _allow(self, node: ast.AST, function: FunctionType, own: str | None, local: set[str]) -> None:
        if isinstance(node, _EXCLUDED) or (isinstance(node, ast.stmt) and not isinstance(node, _STATEMENTS)):
            raise Untraceable(f"its forward has a {type(node).__name__.lower()}")
        if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            raise Untraceable("its forward changes what is not its own")
        if isinstance(node, ast.Name) and node.id not in local:
            self._allow_global(node.id, function)
        if isinstance(node, ast.Attribute):
            self._allow_attribute(node, function, own, local)

    def _allow_global(self, name: str, function: FunctionType) -> None:
        value = function.__globals__.get(name, getattr(builtins, name, None))
        if isinstance(value, FunctionType) and not value.__module__.startswith("torch."):
            self.read(value)
        elif not (_is_plain(value) or value in _MODULES or value is Tensor or name in _BUILTINS or _is_of_torch(value)):
            raise Untraceable(f"its forward uses {name}")

    def _allow_attribute(self, node: ast.Attribute, function: FunctionType, own: str | None, local: set[str]) -> None:
        match node.value:
            case ast.Name(id=base) if base == own:
                found = inspect.getattr_static(self.kind, node.attr, None)
                if hasattr(nn.Module, node.attr) and node.attr != "training":
                    raise Untraceable(f"its forward uses {node.attr} of nn.Module")
                if isinstance(found, FunctionType):
                    self.read(found)
                elif not _is_plain(found):  # found is None where it is the instance's
                    raise Untraceable(f"its forward reads {node.attr}, a {type(found).__name__}")
            case ast.Name(id=base) if base not in local:
                value = getattr(function.__globals__.get(base), node.attr, None)
                if (isinstance(value, ModuleType) and value not in _MODULES) or node.attr.startswith(_ASKING):
                    raise Untraceable(f"its forward uses {base}.{node.attr}")
            case ast.Attribute(value=ast.Name(id=base), attr=name) if base == own:
                if isinstance(getattr(self.module, name, None), nn.Module):
                    raise Untraceable(f"its forward looks into {name}")


def _is_of_torch(value: Any) -> bool:
    """A function of torch's that is not Python's, or `F`'s: not a class, whose instances would be made while tracing."""
    return (
        callable(value) and not isinstance(value, type) and (getattr(value, "__module__", "") or "").startswith("torch")
    )


# ── Tracing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Tracer(fx.Tracer):
    """Calls of layers stay calls."""

    traced_func_name = "traced"
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _twin(module: nn.Module, kind: type[nn.Module], codes: set[CodeType], attributes: dict[str, Any]) -> nn.Module:
    """`module` for the tracer: with the same tensors and layers, and noting which plain attributes `codes` read."""

    class Twin(kind):  # type: ignore[valid-type, misc]
        def __getattribute__(self, name: str) -> Any:
            value = object.__getattribute__(self, name)
            if name in object.__getattribute__(self, "__dict__") and sys._getframe(1).f_code in codes:
                if not _is_plain(value):
                    raise Untraceable(f"its forward reads {name}, a {type(value).__name__}")
                attributes[name] = value
            return value

        def __getattr__(self, name: str) -> Any:
            value = super().__getattr__(name)
            if value is None:
                attributes[name] = None
            return value

    twin = object.__new__(Twin)
    twin.__dict__.update(module.__dict__)
    return twin


def graph_of(
    module: nn.Module, kind: type[nn.Module], tensors: tuple[str, ...], rest: Mapping[str, Any]
) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph of `kind.forward` on `module`, with the plain attributes that it depends on.

    Args:
        kind: `module`'s class, or one before a fused one.
        tensors: the arguments that are tensors. The graph takes them, in this order.
        rest: the others that are given, which must be plain.

    Raises:
        Untraceable: with the reason.
    """
    reader, attributes = _Reader(module, kind), dict[str, Any]()
    twin = _twin(module, kind, reader.codes, attributes)
    # fx takes the names of the arguments from the function's code.
    passed = "".join(f"{name}={name}, " for name in tensors)
    namespace = {"forward": kind.forward, "rest": rest}
    exec(f"def traced(self, {', '.join(tensors)}): return forward(self, {passed}**rest)", namespace)
    type(twin).traced = namespace["traced"]  # type: ignore[attr-defined]
    try:
        graph = _Tracer().trace(twin)
    except Untraceable:
        raise
    except Exception as error:  # fx and the code raise many kinds where a tensor's value is asked for
        raise Untraceable("the way through its forward depends on tensors") from error
    if any(node.op == "get_attr" and node.target.startswith("_tensor_constant") for node in graph.nodes):
        raise Untraceable("its forward makes tensors of its own")
    return graph, attributes


# ── Running ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Run(NamedTuple):
    """A rewritten graph, and that as a function of (module, \\*tensors)."""

    function: Callable[..., Any]
    graph: fx.Graph


Rewrite = Callable[[fx.Graph, nn.Module], list[str]]
"""Changes a graph for the better, and names what it has found."""

MOST_TRACES = 64
"""Of a class. One whose attributes change with every call runs as it is written."""


class Traces:
    """The forwards of a class's modules as rewritten graphs, each made when it is first asked for."""

    def __init__(self, kind: type[nn.Module], rewrite: Rewrite):
        self.kind, self.rewrite = kind, rewrite
        parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        self.names = [p.name for p in parameters] if all(p.kind not in variadic for p in parameters) else []
        self.count = 0
        # For what is given: names of attributes, and for their values what to run; None: the forward as it is.
        self.known: dict[Any, dict[tuple[str, ...], dict[Any, Run | None]]] = {}

    def find(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Run | None, list[Tensor]]:
        """What to run in place of `module.forward(*args, **kwargs)`, if anything, and on which tensors."""
        if len(args) > len(self.names):
            return None, []
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        tensors = {name: value for name, value in given.items() if type(value) in (Tensor, nn.Parameter)}
        rest = {name: value for name, value in given.items() if name not in tensors}
        if not all(map(_is_plain, rest.values())):
            return None, []
        tables = self.known.setdefault((*tensors, *_exactly(rest.items())), {})
        for names, runs in tables.items():
            values = _exactly((name, getattr(module, name, ...)) for name in names)
            if values in runs:
                return runs[values], list(tensors.values())
        run = None
        # fx patches nn.Module while it traces, and other threads may be using that.
        if threading.current_thread() is threading.main_thread() and self.count < MOST_TRACES:
            self.count += 1
            run, attributes = self._trace(module, tuple(tensors), rest)
            tables.setdefault(tuple(attributes), {})[_exactly(attributes.items())] = run
        return run, list(tensors.values())

    def _trace(
        self, module: nn.Module, tensors: tuple[str, ...], rest: dict[str, Any]
    ) -> tuple[Run | None, dict[str, Any]]:
        try:
            graph, attributes = graph_of(module, self.kind, tensors, rest)
        except Untraceable:
            return None, {}
        if not self.rewrite(graph, module):
            return None, attributes
        code = graph.python_code("self")
        namespace = dict(code.globals)
        exec(code.src, namespace)
        return Run(namespace["forward"], graph), attributes

    def survey(self, module: nn.Module) -> tuple[list[str], str]:
        """What there are patterns for in the forward of `module`, with all its arguments or those that it needs; or why its
        forward has no graph."""
        parameters = inspect.signature(self.kind.forward).parameters
        needed = tuple(name for name in self.names if parameters[name].default is inspect.Parameter.empty)
        reason = "" if self.names else "its forward takes any arguments"
        patterns: dict[str, None] = {}
        for tensors in {tuple(self.names), needed} if self.names else ():
            try:
                graph, _ = graph_of(module, self.kind, tensors, {})
            except Untraceable as error:
                reason = str(error)
            else:
                patterns |= dict.fromkeys(self.rewrite(graph, module))
        return list(patterns), reason


def _exactly(items: Iterable[tuple[str, Any]]) -> tuple:
    """For comparison: 1, 1.0 and True are not the same. What is not plain is like nothing known."""
    return tuple((name, type(value), value if _is_plain(value) else id(value)) for name, value in items)
