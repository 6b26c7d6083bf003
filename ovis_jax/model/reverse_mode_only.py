"""Excluding forward-mode differentiation where a kernel does not support it, with a clear error."""

from typing import Any, NoReturn

from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ovis_jax.errors import RequestError


def reverse_mode_only(x: Array, name: str) -> Array:
    """Return `x`; computing its tangent raises an error that names the unsupported function.

    JAX raises a similar error for functions with `jax.custom_vjp`, but does not name the function.

    Raises:
      RequestError: The program needs the tangent, as for `jax.jvp`, `jax.jacfwd` or `jax.hessian`.
        The error is raised when the program is lowered. `jax.grad` needs no tangent, because it
        transposes the program first.
    """
    return _identity.bind(x, name=name)


def _refuse(*_: Any, name: str) -> NoReturn:
    raise RequestError(
        f"{name} does not support forward-mode differentiation (jax.jvp, jax.jacfwd, jax.hessian);"
        ' create the model with attention_kernel="blockwise" or "plain"'
    )


_identity = Primitive("reverse_mode_only")
_tangent = Primitive("reverse_mode_only_tangent")
for primitive in (_identity, _tangent):
    primitive.def_abstract_eval(lambda x, name: x)
    batching.defvectorized(primitive)
_identity.def_impl(lambda x, name: x)
mlir.register_lowering(_identity, lambda ctx, x, name: [x])
ad.deflinear2(_tangent, lambda ct, x, name: [ct])
ad.defjvp(_identity, lambda t, x, name: _tangent.bind(t, name=name))
_tangent.def_impl(_refuse)
mlir.register_lowering(_tangent, _refuse)
