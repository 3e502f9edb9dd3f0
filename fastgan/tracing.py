"""What a `forward` that somebody wrote by hand does, as a graph of torch.fx: where it is certain to do it again.

A graph stands for one way through the code. So the code may call layers and functions of torch, read tensors, and decide on
its arguments and on plain attributes: these are compared whenever the graph is to run. Code that reads, changes or asks for
anything else has no graph.

The code is run once on stand-ins for its tensors, its layers and what it names from outside, which note what is done with
them. Nothing else is changed meanwhile, so that other threads may use the model. What the code does not come to on its way
may be anything that changes nothing.
"""

import ast
import builtins
import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MappingProxyType, MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


class Untraceable(Exception):
    """Why a forward is not certain to do again what it does now."""


# ── What the code may be made of ─────────────────────────────────────────────────────────────────────────────────────

_STATEMENTS = (
    ast.AnnAssign, ast.Assert, ast.Assign, ast.AugAssign, ast.Expr, ast.For, ast.If, ast.Pass, ast.Raise, ast.Return,
)  # fmt: skip
_EXCLUDED = (ast.Await, ast.Lambda, ast.NamedExpr, ast.Yield, ast.YieldFrom)
_BUILTINS = {
    "abs", "bool", "enumerate", "float", "int", "len", "list", "max", "min", "range", "reversed", "round", "slice", "sum",
    "tuple", "zip",
}  # fmt: skip
_MODULES = (torch, nn, F, math, operator)
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


class BrokenAssertion(Exception):
    """What the code asserts of its tensors does not hold: it has an error of its own for that."""


def require(condition: Any) -> None:
    """Stands in a graph for an assertion."""
    if not condition:
        raise BrokenAssertion


_ASSERT = "assert"  # a name that no code can have


class _Assertions(ast.NodeTransformer):
    """Makes calls of assertions: Python asks a tensor whether it is true, which a stand-in for one cannot say."""

    def visit_Assert(self, node: ast.Assert) -> ast.Expr:
        call = ast.Call(ast.Name(_ASSERT, ast.Load()), [node.test], [])
        return ast.fix_missing_locations(ast.copy_location(ast.Expr(call), node))


def _assert(condition: Any) -> None:
    if isinstance(condition, fx.Proxy):
        condition.tracer.create_proxy("call_function", require, (condition,), {})
    elif not condition:
        raise Untraceable("its forward asserts what does not hold")


class _Forbidden:
    """Stands for what the code may name, but not come to use."""

    def __init__(self, name: str):
        self.__dict__["_name"] = name

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise Untraceable(f"its forward uses {self._name}")

    def __getattr__(self, name: str) -> Any:
        raise Untraceable(f"its forward uses {self._name}.{name}")

    __call__ = __getitem__ = __iter__ = __contains__ = __bool__ = __len__ = __format__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse


class _Library:
    """Stands for one of `_MODULES`, and gives of it what does nothing but compute on its arguments."""

    def __init__(self, name: str, module: Any, globals: list[_Global]):
        self._name, self._module, self._globals = name, module, globals

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name, _MISSING)
        path = f"{self._name}.{name}"
        self._globals.append(_Global(vars(self._module), name, value))
        if _is_module(value):
            return _Library(path, value, self._globals)
        if isinstance(value, type) and value in _MADE:
            return _maker(value, self._globals)
        is_allowed = self._module in (math, operator) or _is_plain(value) or _is_of_tensors(name, value)
        return value if is_allowed else _Forbidden(path)


class _Reader:
    """Reads functions before they are traced, gives them stand-ins for what they name from outside, and notes what of that
    they depend on."""

    def __init__(self) -> None:
        self.functions: dict[FunctionType, FunctionType] = {}
        self.globals: list[_Global] = []

    def read(self, function: Any) -> FunctionType:
        """The function as it is to be traced."""
        if not isinstance(function, FunctionType) or function.__closure__ or hasattr(function, "__wrapped__"):
            raise Untraceable("its forward or what that calls is no plain function")
        if function not in self.functions:
            if not all(map(_is_plain, (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()))):
                raise Untraceable("its forward or what that calls has defaults that can change")
            definition = _source_of(function)
            nodes = [node for statement in definition.body for node in ast.walk(statement)]
            for node in nodes:
                _allow(node)
            own = {*function.__code__.co_varnames, *(n.id for n in nodes if _is_stored(n))}  # type: ignore[attr-defined]
            names = {node.id for node in nodes if isinstance(node, ast.Name)} - own
            outside = {name: self._stand_in(name, function.__globals__) for name in names}
            outside |= {"__builtins__": {}, _ASSERT: _assert}
            code = _code_of(ast.Module([_Assertions().visit(definition)], []))
            read = FunctionType(code, outside, function.__name__, function.__defaults__)
            read.__kwdefaults__ = function.__kwdefaults__
            self.functions[function] = read
        return self.functions[function]

    def _stand_in(self, name: str, namespace: dict[str, Any]) -> Any:
        """For what a function names from outside."""
        value = namespace.get(name, _MISSING)
        self.globals.append(_Global(namespace, name, value))
        if value is _MISSING:
            if name in _BUILTINS:
                return getattr(builtins, name)
            return _OWN_BUILTINS.get(name, _Forbidden(name))
        if _is_module(value):
            return _Library(name, value, self.globals)
        if isinstance(value, FunctionType) and not (value.__module__ or "").startswith("torch."):
            return lambda *args, **kwargs: self.read(value)(*args, **kwargs)
        if isinstance(value, type) and value in _MADE:
            return _maker(value, self.globals)
        is_allowed = _is_plain(value) or value is Tensor or _is_of_tensors(name, value)
        return value if is_allowed else _Forbidden(name)


def _allow(node: ast.AST) -> None:
    if isinstance(node, _EXCLUDED) or (isinstance(node, ast.stmt) and not isinstance(node, _STATEMENTS)):
        raise Untraceable(f"its forward has a {type(node).__name__.lower()}")
    if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
        raise Untraceable("its forward changes what is not its own")
    if isinstance(node, ast.Compare) and _compares_objects(node):
        raise Untraceable("its forward compares objects")
    if isinstance(node, ast.Attribute) and node.attr.startswith("__"):
        raise Untraceable(f"its forward uses {node.attr}")


def _source_of(function: FunctionType) -> ast.FunctionDef:
    try:
        source = inspect.getsource(function)
        if source[:1].isspace():  # dedented, a docstring of several lines would be another one
            source = f"if True:\n{source}"
        tree = ast.parse(source)
        compiled = _code_of(tree)
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        raise Untraceable("its forward has no source") from error
    (definition,) = tree.body[0].body if isinstance(tree.body[0], ast.If) else tree.body
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
        raise Untraceable("its forward or what that calls is no plain function")
    if _content(compiled) != _content(function.__code__):
        raise Untraceable("its forward has been edited since it was loaded")
    return definition


def _code_of(tree: ast.Module) -> CodeType:
    """Of the one function in it."""
    (code,) = (part for part in compile(tree, "<forward>", "exec").co_consts if isinstance(part, CodeType))
    return code


def _content(code: CodeType) -> tuple:
    """What differs where the source is another function's. The instructions also tell of the module around it."""
    inner = [_content(part) for part in code.co_consts if isinstance(part, CodeType)]
    # Up to Python 3.10 the qualified name of a function inside, which tells of the class around it, is a constant too.
    own = [c for c in code.co_consts if not isinstance(c, CodeType) and not (isinstance(c, str) and "<locals>." in c)]
    return code.co_names, code.co_varnames, own, inner


def _compares_objects(node: ast.Compare) -> bool:
    is_named = any(isinstance(side, ast.Constant) for side in (node.left, *node.comparators))
    return not is_named and any(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)


def _is_module(value: Any) -> bool:
    return any(value is module for module in _MODULES)


def _is_stored(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


# Layers that code may make as it runs: they hold no tensors, draw no numbers, and call one function.
_MADE = (
    nn.ELU, nn.GELU, nn.LeakyReLU, nn.LogSoftmax, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softmax, nn.Softplus,
    nn.Tanh, nn.Upsample,
)  # fmt: skip


def _maker(kind: Any, globals: list[_Global]) -> Callable[..., Callable[[Any], Any]]:
    globals.append(_Global(vars(kind), "forward", kind.forward))
    return lambda *args, **kwargs: functools.partial(kind.forward, kind(*args, **kwargs))


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
    """What the attribute is, as it is kept: no property is asked. A number of numpy's is Python's."""
    value = _kept(module, name)
    return float(value) if isinstance(value, float) and type(value).__module__ == "numpy" else value


def _kept(module: nn.Module, name: str) -> Any:
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
    return value if kind in (FunctionType, BuiltinFunctionType) else _MISSING


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
        if isinstance(a, _Forbidden):
            a._refuse()
        return super().create_arg(a)


class _Layer:
    """Stands for a layer, which can be called, or asked for as one that may be None, and nothing else."""

    def __init__(self, path: str, tracer: _Tracer, is_true: bool | None):
        self._path, self._tracer, self._is_true = path, tracer, is_true

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tracer.create_proxy("call_module", self._path, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        raise Untraceable(f"its forward looks into {self._path}")

    def __bool__(self) -> bool:
        if self._is_true is None:
            raise Untraceable(f"its forward looks into {self._path}")
        return self._is_true

    def __eq__(self, other: object) -> bool:
        raise Untraceable(f"its forward looks into {self._path}")


class _Chain(_Layer):
    """Stands for an nn.Sequential, of which the code may also take the layers."""

    def __init__(self, path: str, tracer: _Tracer, children: tuple):
        super().__init__(path, tracer, len(children) > 0)
        self._children = children

    def __len__(self) -> int:
        return len(self._children)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._children)

    def __getitem__(self, index: int) -> Any:
        return self._children[operator.index(index)]


_OF_CONTAINERS = ("__iter__", "__getitem__", "__len__")


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
    kind = type(value)
    if isinstance(value, nn.Sequential) and all(getattr(kind, n) is getattr(nn.Sequential, n) for n in _OF_CONTAINERS):
        return _Chain(path, tracer, tuple(children.values()))
    is_plain_object = not any(hasattr(kind, name) for name in ("__bool__", "__len__"))
    return _Layer(path, tracer, True if is_plain_object else None)


class _Self:
    """Stands for the module, and notes what the code reads of it."""

    def __init__(self, module: nn.Module, tracer: _Tracer, reader: _Reader, reads: dict[str, Any]):
        def read(name: str) -> Any:
            value = _look_up(module, name)
            reads[name] = _essence(value)
            if callable(value) and _is_of_tensors(getattr(value, "__name__", ""), value):
                return value
            if isinstance(value, FunctionType):
                if hasattr(nn.Module, name):
                    raise Untraceable(f"its forward uses {name} of nn.Module")
                if name in module.__dict__ or isinstance(inspect.getattr_static(module, name), staticmethod):
                    raise Untraceable(f"its forward calls {name}, which is no method")
                return MethodType(reader.read(value), self)
            if not (_is_plain(value) or isinstance(value, (Tensor, nn.Module))):
                raise Untraceable(f"its forward reads {name}" + f", a {type(value).__name__}" * (value is not _MISSING))
            return _stand_in(value, name, tracer)

        object.__setattr__(self, "_read", read)

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, "_read")(name)


def _getattr(module: Any, name: str) -> Any:
    """`getattr(self, name)`, as code does whose layers have numbers."""
    if type(module) is not _Self or type(name) is not str or name.startswith("__"):
        raise Untraceable("its forward uses getattr")
    return getattr(module, name)


def _str(value: Any) -> str:
    if not _is_plain(value):
        raise Untraceable("its forward uses str")
    return str(value)


_OWN_BUILTINS: dict[str, Any] = {"getattr": _getattr, "str": _str}


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
    function = reader.read(forward)
    tracer = _Tracer(graph)
    proxies = {name: tracer.create_proxy("placeholder", name, (), {}) for name in tensors}
    try:
        result = function(_Self(module, tracer, reader, reads), **proxies, **rest)
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
