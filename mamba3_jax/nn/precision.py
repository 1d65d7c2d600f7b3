"""Which dtype a module computes in, and what its products keep."""

import jax.numpy as jnp

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def einsum(equation: str, *operands, dtype, out=None):
    """einsum of `operands` cast to `dtype`, accumulated in float32 and returned in `out` (default `dtype`).

    float32 means true float32 products: the backends' default would be TF32 on NVIDIA GPUs and bfloat16 on TPUs.
    """
    operands = [operand.astype(dtype) for operand in operands]
    precision = "highest" if dtype == jnp.float32 else None
    return jnp.einsum(equation, *operands, precision=precision, preferred_element_type=out or dtype)
