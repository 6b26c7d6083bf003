"""Forward-mode differentiation, and derivatives of second order in both orders."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ovis_jax.errors import RequestError
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model.attention_kernels import KernelSetting, crop_attention, prompt_attention
from ovis_jax.model.linear import linear

DERIVATIVES = {
    "grad": lambda f, x, v: jax.grad(f, (0, 1))(*x),
    "jvp": lambda f, x, v: jax.jvp(f, x, v),
    "jacfwd": lambda f, x, v: jax.jacfwd(f, (0, 1))(*x),
    "hessian": lambda f, x, v: jax.hessian(f, (0, 1))(*x),
    "forward over reverse": lambda f, x, v: jax.jvp(jax.grad(f, (0, 1)), x, v),
    "reverse over forward": lambda f, x, v: jax.grad(lambda *x: jax.jvp(f, x, v)[1], (0, 1))(*x),
    "reverse over reverse": lambda f, x, v: jax.grad(
        lambda *x: sum(map(jnp.vdot, jax.grad(f, (0, 1))(*x), v)), (0, 1)
    )(*x),
    "vmap of activations": lambda f, x, v: jax.vmap(jax.grad(f, (0, 1)), (1, None))(*x),
    "vmap of weights": lambda f, x, v: jax.vmap(jax.grad(f, (0, 1)), (None, 0))(
        x[0], jnp.stack([x[1], v[1]])
    ),
    "vmap of both": lambda f, x, v: jax.vmap(jax.grad(f, (0, 1)))(
        jnp.stack([x[0], v[0]]), jnp.stack([x[1], v[1]])
    ),
    "vmap of a Hessian-vector product": lambda f, x, v: jax.vmap(
        lambda u: jax.jvp(jax.grad(f), x, (u, v[1]))
    )(jnp.stack(v[:1] * 2)),
    "checkpoint": lambda f, x, v: jax.jvp(jax.grad(jax.checkpoint(f), (0, 1)), x, v),
    "checkpoint with a policy": lambda f, x, v: jax.grad(
        jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable), (0, 1)
    )(*x),
}


def arrays(dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((2, 3, 8), (5, 8)) * 2
    x, w, dx, dw = (jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))
    return (x, w), (dx, dw)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_derivatives_of_a_product(derivative, dtype, tolerance):
    def einsum(x, w):
        return jnp.einsum("...i,oi->...o", x, w, precision="highest")

    def summed(product):
        return lambda x, w: jnp.sum(jnp.sin(product(x, w).astype(jnp.float32)))

    found, expected = (derivative(summed(f), *arrays(dtype)) for f in (linear, einsum))
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for x, y in pairs:
        assert x.dtype == y.dtype and x.shape == y.shape
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, atol=tolerance * np.abs(y).max())


def test_gradients_of_a_product_inside_shard_map():
    """Activations differ between the devices, and the weight does not."""
    (x, w), _ = arrays("float32")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, same = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(linear, mesh=mesh, in_specs=(rows, same), out_specs=rows)

    def gradients(product):
        return jax.jit(jax.grad(lambda x, w: jnp.sum(product(x, w) ** 2), (0, 1)))(x, w)

    for found, expected in zip(gradients(sharded), gradients(linear), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kernel", ["plain", "blockwise"])
def test_hessian_vector_products_of_the_model(shallow, kernel):
    """Tangents agree with the gradient, and both orders of a second derivative with each other."""
    model, params = shallow
    model = replace(model, attention_kernel=kernel)
    rng = np.random.default_rng(0)
    tokens = rng.integers(108, 600, (1, 12)).astype(np.int32)
    tokens[0, 1:10] = -300
    positions = np.arange(12, dtype=np.int32)[None]
    inputs = Inputs(tokens, positions, rng.normal(size=(1, 70, 70, 3)).astype(np.float32))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    tangent = structure.unflatten(
        [jax.random.normal(k, x.shape) * 1e-2 for k, x in zip(keys, leaves, strict=True)]
    )

    def loss(params):
        return jnp.mean(jnp.square(model.forward(params, inputs)[0]))

    @jax.jit
    def derivatives(params, tangent):
        gradient, product = jax.jvp(jax.grad(loss), (params,), (tangent,))
        slope, other = jax.value_and_grad(lambda p: jax.jvp(loss, (p,), (tangent,))[1])(params)
        return gradient, slope, product, other

    gradient, slope, product, other = derivatives(params, tangent)
    dots = jax.tree.map(lambda g, t: np.vdot(np.asarray(g, np.float64), t), gradient, tangent)
    assert slope == pytest.approx(sum(jax.tree.leaves(dots)), rel=1e-4)
    found, expected = (jax.tree.leaves(jax.device_get(x)) for x in (product, other))
    largest = max(np.abs(x).max() for x in expected)  # some second derivatives are almost zero
    assert largest > 0
    for x, y in zip(found, expected, strict=True):
        assert np.abs(x - y).max() <= 1e-3 * np.abs(y).max() + 1e-5 * largest


@pytest.mark.slow
def test_a_kernel_without_forward_mode_is_named():
    q, positions = jnp.ones((1, 256, 2, 128)), jnp.arange(256)[None]
    key = jnp.ones((1, 2, 256, 128))
    setting = KernelSetting("auto", "tpu")
    functions = {
        "prompt": lambda q: prompt_attention(
            q, key, key, positions, window=None, scale=0.1, cap=None, setting=setting
        ),
        "crops": lambda q: crop_attention(q, key, key, scale=0.1, setting=setting),
    }
    for attention in functions.values():
        program = jax.jit(lambda q, f=attention: jax.jvp(f, (q,), (q,)))
        message = "attention kernel 'splash' does not support forward-mode differentiation"
        with pytest.raises(RequestError, match=message):
            program.trace(q).lower(lowering_platforms=("tpu",))
        gradient = jax.jit(jax.grad(lambda q, f=attention: jnp.sum(f(q))))
        assert "splash" in gradient.trace(q).lower(lowering_platforms=("tpu",)).as_text()
