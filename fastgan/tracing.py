"""What a `forward` that somebody wrote by hand does, as a graph of torch.fx: where it is certain to do it again.

A graph stands for one way through the code. So the code may call layers and functions of torch, read tensors, and decide on
its arguments and on plain attributes: these are compared whenever the graph is to run. Code that reads, changes or asks for
anything else has no graph.

The code is run once on stand-ins for its tensors and its layers, which note what is done with them. Nothing else is changed
meanwhile, so that other threads may use the model.
"""

import ast
import inspect
import math
import operator
import textwrap
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, MappingProxyType, MethodType
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
# Of torch's functions those that Tensor has as methods, and these. None tells of anything but its arguments.
_OF_TENSORS = {
    "cat", "concat", "conv2d", "conv_transpose2d", "einsum", "instance_norm", "ones_like", "pixel_shuffle", "rand_like",
    "randn_like", "stack", "std_mean", "var_mean", "zeros_like",
}  # fmt: skip
_NOT_OF_TENSORS = ("assert_", "boolean_", "handle_", "has_")  # in F
_PLAIN = {bool, float, int, str, type(None), torch.device, torch.dtype, torch.memory_format}
_MISSING = object()


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or (type(value) in (tuple, torch.Size) and all(map(_is_plain, value)))


class _Global(NamedTuple):
    """A value that code reads by name from outside."""

    namespace: Mapping[str, Any]
    name: str
    value: Any

    def is_same(self) -> bool:
        return self.namespace.get(self.name, _MISSING) is self.value


class _Reader:
    """Reads functions before they are traced, and notes which globals they depend on."""

    def __init__(self) -> None:
        self.codes: set[CodeType] = set()
        self.globals: list[_Global] = []

    def read(self, function: Any) -> None:
        if not isinstance(function, FunctionType) or function.__closure__ or hasattr(function, "__wrapped__"):
            raise Untraceable("its forward or what that calls is no plain function")
        if function.__code__ in self.codes:
            return
        self.codes.add(function.__code__)
        if not all(map(_is_plain, (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()))):
            raise Untraceable("its forward or what that calls has defaults that can change")
        tree = _source_of(function)
        nodes = [node for statement in tree.body for node in ast.walk(statement)]
        local = {*function.__code__.co_varnames, *(n.id for n in nodes if _is_stored(n))}  # type: ignore[attr-defined]
        for node in nodes:
            self._allow(node, function, local)

    def _allow(self, node: ast.AST, function: FunctionType, local: set[str]) -> None:
        if isinstance(node, _EXCLUDED) or (isinstance(node, ast.stmt) and not isinstance(node, _STATEMENTS)):
            raise Untraceable(f"its forward has a {type(node).__name__.lower()}")
        if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            raise Untraceable("its forward changes what is not its own")
        if isinstance(node, ast.Compare) and _compares_objects(node):
            raise Untraceable("its forward compares objects")
        if isinstance(node, ast.Name) and node.id not in local:
            self._allow_global(node.id, function)
        if isinstance(node, ast.Attribute):
            if node.attr.startswith("__"):
                raise Untraceable(f"its forward uses {node.attr}")
            if isinstance(node.value, ast.Name) and node.value.id not in local:
                self._allow_attribute(node.value.id, node.attr, function.__globals__.get(node.value.id))

    def _allow_global(self, name: str, function: FunctionType) -> None:
        value = function.__globals__.get(name, _MISSING)
        self.globals.append(_Global(function.__globals__, name, value))
        if isinstance(value, FunctionType) and not (value.__module__ or "").startswith("torch."):
            self.read(value)
        elif value is _MISSING:
            if name not in _BUILTINS:
                raise Untraceable(f"its forward uses {name}")
        elif not (_is_plain(value) or _is_module(value) or value is Tensor or _is_of_tensors(name, value)):
            raise Untraceable(f"its forward uses {name}")

    def _allow_attribute(self, base: str, name: str, module: Any) -> None:
        value = getattr(module, name) if _is_module(module) and hasattr(module, name) else _MISSING
        if module not in (math, operator) and not (_is_plain(value) or _is_of_tensors(name, value)):
            raise Untraceable(f"its forward uses {base}.{name}")
        self.globals.append(_Global(vars(module), name, value))


def _source_of(function: FunctionType) -> ast.FunctionDef:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        (compiled,) = (c for c in compile(tree, "<forward>", "exec").co_consts if isinstance(c, CodeType))
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        raise Untraceable("its forward has no source") from error
    (definition,) = tree.body
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
        raise Untraceable("its forward or what that calls is no plain function")
    if _content(compiled) != _content(function.__code__):
        raise Untraceable("its forward has been edited since it was loaded")
    return definition


def _content(code: CodeType) -> tuple:
    """What differs where the source is another function's. The instructions also tell of the module around it."""
    inner = [_content(part) for part in code.co_consts if isinstance(part, CodeType)]
    return code.co_names, code.co_varnames, [c for c in code.co_consts if not isinstance(c, CodeType)], inner


def _compares_objects(node: ast.Compare) -> bool:
    is_named = any(isinstance(side, ast.Constant) for side in (node.left, *node.comparators))
    return not is_named and any(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)


def _is_module(value: Any) -> bool:
    return any(value is module for module in _MODULES)


def _is_stored(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def _is_of_tensors(name: str, value: Any) -> bool:
    """Whether a function of torch's does nothing but compute on its arguments."""
    if isinstance(value, type) or not callable(value):
        return False
    if value is getattr(F, name, _MISSING):
        return not name.startswith(_NOT_OF_TENSORS)
    return value is getattr(torch, name, _MISSING) and (hasattr(Tensor, name) or name in _OF_TENSORS)


# ── Tracing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_STORES = ("__dict__", "_parameters", "_buffers", "_modules")


def _look_up(module: nn.Module, name: str) -> Any:
    """What the attribute is, as it is kept: no property is asked."""
    own = module.__dict__
    if name in own:
        return own[name]
    value = getattr(type(module), name, _MISSING)
    if value is _MISSING:
        for store in ("_parameters", "_buffers", "_modules"):
            if name in own[store]:
                return own[store][name]
    return value


def _essence(value: Any) -> Any:
    """What a graph depends on of what it reads, for comparison: of plain values all, of tensors that they are tensors, of
    layers their classes. Whatever else it reads, there is none."""
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if kind is tuple or kind is torch.Size:
        return kind, *map(_essence, value)
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return kind, *((name, _essence(child)) for name, child in value._modules.items())
    if isinstance(value, nn.Module):
        return kind
    return value if kind is FunctionType else _MISSING


class _Proxy(fx.Proxy):
    """Also what works in place is itself in the graph. torch.fx's own makes x + y of x += y."""


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    """x += y and its like as a function of its own: of operator's, torch.fx writes statements, which bind x anew."""

    def function(x: Any, y: Any) -> Any:
        return getattr(operator, name)(x, y)

    function.__name__ = name
    setattr(_Proxy, f"__{name}__", lambda x, y: x.tracer.create_proxy("call_function", function, (x, y), {}))
    return function


_OPERATORS = ("iadd", "iand", "ifloordiv", "imatmul", "imod", "imul", "ior", "ipow", "isub", "itruediv", "ixor")
IN_PLACE = {name: _in_place(name) for name in _OPERATORS}


class _Tracer(fx.proxy.GraphAppendingTracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            raise Untraceable("its forward makes tensors of its own")
        return super().create_arg(a)


class _Layer:
    """Stands for a layer, which can be called and nothing else."""

    def __init__(self, path: str, tracer: _Tracer):
        self._path, self._tracer = path, tracer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tracer.create_proxy("call_module", self._path, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        raise Untraceable(f"its forward looks into {self._path}")

    def __bool__(self) -> bool:
        raise Untraceable(f"its forward looks into {self._path}")

    def __eq__(self, other: object) -> bool:
        raise Untraceable(f"its forward looks into {self._path}")


class _Chain(_Layer):
    """Stands for an nn.Sequential, of which the code may also take the layers."""

    def __init__(self, path: str, tracer: _Tracer, children: tuple):
        super().__init__(path, tracer)
        self._children = children

    def __iter__(self) -> Iterator[Any]:
        return iter(self._children)

    def __getitem__(self, index: int) -> Any:
        return self._children[operator.index(index)]


def _stand_in(value: Any, path: str, tracer: _Tracer) -> Any:
    """For what the code reads of its module."""
    if _is_plain(value):
        return value
    if isinstance(value, Tensor):
        return tracer.create_proxy("get_attr", path, (), {})
    children = {
        name: _stand_in(child, f"{path}.{name}", tracer) for name, child in getattr(value, "_modules", {}).items()
    }
    if type(value) is nn.ModuleList:
        return tuple(children.values())
    if type(value) is nn.ModuleDict:
        return MappingProxyType(children)
    is_chain = isinstance(value, nn.Sequential) and type(value).__iter__ is nn.Sequential.__iter__
    if is_chain and type(value).__getitem__ is nn.Sequential.__getitem__:
        return _Chain(path, tracer, tuple(children.values()))
    return _Layer(path, tracer)


class _Self:
    """Stands for the module, and notes what the code reads of it."""

    def __init__(self, module: nn.Module, tracer: _Tracer, reader: _Reader, reads: dict[str, Any]):
        def read(name: str) -> Any:
            value = _look_up(module, name)
            reads[name] = _essence(value)
            if isinstance(value, FunctionType):
                if hasattr(nn.Module, name):
                    raise Untraceable(f"its forward uses {name} of nn.Module")
                if name in module.__dict__ or isinstance(inspect.getattr_static(module, name), staticmethod):
                    raise Untraceable(f"its forward calls {name}, which is no method")
                reader.read(value)
                return MethodType(value, self)
            if not (_is_plain(value) or isinstance(value, (Tensor, nn.Module))):
                raise Untraceable(f"its forward reads {name}" + f", a {type(value).__name__}" * (value is not _MISSING))
            return _stand_in(value, name, tracer)

        object.__setattr__(self, "_read", read)

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, "_read")(name)


def trace(
    module: nn.Module, forward: Any, tensors: tuple[str, ...], rest: Mapping[str, Any], reads: dict[str, Any]
) -> tuple[fx.Graph, list[_Global]]:
    """What `forward(module, …)` does, and the globals that it depends on.

    Args:
        tensors: the names of the arguments that are tensors. The graph takes them, in this order.
        rest: the other arguments that are given, which must be plain.
        reads: gets the essence of each attribute that the outcome depends on.

    Raises:
        Untraceable: with the reason.
    """
    reader, graph = _Reader(), fx.Graph()
    reader.read(forward)
    tracer = _Tracer(graph)
    proxies = {name: tracer.create_proxy("placeholder", name, (), {}) for name in tensors}
    try:
        result = forward(_Self(module, tracer, reader, reads), **proxies, **rest)
        tracer.create_node("output", "output", (tracer.create_arg(result),), {})
    except Untraceable:
        raise
    except Exception as error:  # fx and the code raise many kinds where a tensor's value is asked for
        raise Untraceable("the way through its forward depends on tensors") from error
    return graph, reader.globals


# ── Running ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Run(NamedTuple):
    """A rewritten graph, and that as a function of (module, \\*tensors)."""

    function: Callable[..., Any]
    graph: fx.Graph
    globals: list[_Global]


Rewrite = Callable[[fx.Graph, nn.Module], list[Any]]
"""Changes a graph for the better, and says what it has found, in values that can be hashed."""

MOST_TRACES = 64
"""Of a class. One whose attributes change with every call runs as it is written."""


def compiled(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a function of (self, \\*placeholders)."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)
    return namespace["forward"]


class Traces:
    """The forwards of a class's modules as rewritten graphs, each made when it is first asked for."""

    def __init__(self, kind: type[nn.Module], rewrite: Rewrite):
        self.kind, self.forward, self.rewrite = kind, kind.forward, rewrite
        parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        self.names = [p.name for p in parameters] if all(p.kind not in variadic for p in parameters) else []
        self.positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] if self.names else []
        self.needed = [p.name for p in parameters if p.default is inspect.Parameter.empty]
        self.count = 0
        # For what is given: names of attributes, and for their essences what to run; None: the forward as it is.
        self.known: dict[Any, dict[tuple[str, ...], dict[Any, Run | None]]] = {}

    def find(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Run | None, list[Tensor]]:
        """What to run in place of `module.forward(*args, **kwargs)`, if anything, and on which tensors."""
        given = {**dict(zip(self.positional, args, strict=False)), **kwargs}
        if len(given) != len(args) + len(kwargs) or self.kind.forward is not self.forward:
            return None, []
        tensors = {name: value for name, value in given.items() if type(value) in (Tensor, nn.Parameter)}
        rest = {name: value for name, value in given.items() if name not in tensors}
        if not all(map(_is_plain, rest.values())):
            return None, []
        key = (*tensors, *((name, _essence(value)) for name, value in rest.items()))
        tables = self.known.setdefault(key, {})
        for names, runs in list(tables.items()):
            essences = tuple([_essence(_look_up(module, name)) for name in names])
            if essences in runs:
                run = runs[essences]
                is_valid = run is None or all([read.is_same() for read in run.globals])
                return run if is_valid else None, list(tensors.values())
        run = None
        if self.count < MOST_TRACES:
            self.count += 1
            reads: dict[str, Any] = {}
            run = self._trace(module, tuple(tensors), rest, reads)
            tables.setdefault(tuple(reads), {})[tuple(reads.values())] = run
        return run, list(tensors.values())

    def _trace(
        self, module: nn.Module, tensors: tuple[str, ...], rest: dict[str, Any], reads: dict[str, Any]
    ) -> Run | None:
        try:
            graph, outside = trace(module, self.forward, tensors, rest, reads)
        except Untraceable:
            return None
        return Run(compiled(graph), graph, outside) if self.rewrite(graph, module) else None

    def survey(self, module: nn.Module) -> tuple[list[Any], str]:
        """What there are patterns for in the forward of `module`, with all its arguments or those that it needs; or why its
        forward has no graph."""
        reason = "" if self.names else "its forward takes any arguments"
        patterns: dict[Any, None] = {}
        for tensors in dict.fromkeys((tuple(self.names), tuple(self.needed))) if self.names else ():
            try:
                graph, _ = trace(module, self.forward, tensors, {}, {})
            except Untraceable as error:
                reason = str(error)
            else:
                patterns |= dict.fromkeys(self.rewrite(graph, module))
        return list(patterns), reason
