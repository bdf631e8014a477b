"""What a traced function consists of: the oracle for formulas of a model's operations."""

import math
from collections.abc import Callable, Iterator

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters.partial_eval import dce_jaxpr


def traced_operations(function: Callable, *args) -> int:
    """Operations (2 per multiply-add) of all products that the results of `function` need.

    Nothing is compiled or computed: `args` may be shapes. A loop counts as often as it runs.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    needed, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return operations_of(needed)


def operations_of(jaxpr: Jaxpr) -> int:
    """Operations of all products in a program, those of the functions it calls among them."""
    return sum(equation_operations(equation) for equation in jaxpr.eqns)


def equation_operations(equation: JaxprEqn) -> int:
    """Operations of one product, or of the products of what is called.

    Raises:
      ValueError: products that run nobody knows how often, or a convolution.
    """
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        contracted, _ = params["dimension_numbers"][0]
        shape = equation.invars[0].aval.shape
        summed = math.prod(shape[axis] for axis in contracted)
        return 2 * math.prod(equation.outvars[0].aval.shape) * summed
    inner = sum(operations_of(jaxpr) for jaxpr in called(params))
    if name == "conv_general_dilated" or (inner and name in ("while", "cond")):
        raise ValueError(f"cannot count {name}")
    return inner * params["length"] if name == "scan" else inner


def equations(jaxpr: Jaxpr, name: str) -> Iterator[JaxprEqn]:
    """The equations of this primitive, as often as they are reached by calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        for inner in called(equation.params):
            yield from equations(inner, name)


def called(params: dict) -> Iterator[Jaxpr]:
    """The programs among an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item
