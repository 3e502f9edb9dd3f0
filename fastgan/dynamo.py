"""`torch.compile(model, backend="fastgan")`: the patterns of `fuse` in the graphs that Dynamo captures."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fastgan.fuse import rewrite

_log = logging.getLogger(__name__)


def compile_graph(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The backend "fastgan" of `torch.compile`, by which fused operators compute what there are patterns for.

    The patterns are those of `fastgan.fuse`, looked for in the graph that Dynamo has captured. So they are also found in
    forwards that `fuse` cannot read: control flow that depends on data breaks the graph, and each part has its own patterns.
    Layers that have hooks or a parametrized weight are in the graph as what they compute, and so in the patterns too.

    The graph runs by ordinary autograd, to every order: a compiled critic under a gradient penalty works. No other compiler
    runs, and what is in no pattern runs as it would have without `torch.compile`; a graph without patterns comes back as it
    was. Batches of other sizes, symbolic shapes, autocast, training and evaluation are what Dynamo makes of them.

    The logger "fastgan.dynamo" tells at level INFO what was found in each graph, a pattern a line.

    Args:
        module: the graph. It is changed.
        inputs: what it will be called on, at first; not looked at.
    """
    patterns = rewrite(module.graph, module)
    _log.info("%s", "\n".join([f"patterns in a graph that Dynamo has captured: {len(patterns)}", *map(str, patterns)]))
    if patterns:
        module.recompile()
    return module.forward
