"""`jax.jit` for tests that compile hundreds of small programs."""

import functools

import jax

# A seventh of the compile time. What the program computes is the same; how loops become machine code is not, so some
# test of each family compiles as users do.
OPTIONS = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # later ones do not know it
    OPTIONS["xla_cpu_use_fusion_emitters"] = False


def quick_jit(function=None, **settings):
    """`jax.jit` with the machine code left unoptimised on CPU."""
    if function is None:
        return functools.partial(quick_jit, **settings)
    return jax.jit(function, compiler_options=OPTIONS if jax.default_backend() == "cpu" else None, **settings)
