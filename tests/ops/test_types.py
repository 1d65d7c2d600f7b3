"""The shape annotations of mamba3_jax.ops hold: its functions are called under jaxtyping's import hook."""

import subprocess
import sys
import textwrap

import pytest


def run(code: str) -> subprocess.CompletedProcess:
    hook = """
        from jaxtyping import install_import_hook
        with install_import_hook("mamba3_jax.ops", "beartype.beartype"):
            from mamba3_jax.ops import angle, discretize
            from mamba3_jax.ops.ssm import IMPLEMENTATIONS, ssm
        from pallas_kernels.ssm.cases import MIMO, SISO, SSD
        from tests.ops.cases import FLOAT32, draw
        import functools
        import jax
        import jax.numpy as jnp
    """
    code = textwrap.dedent(hook) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.mark.full
def test_annotations_hold():
    done = run("""
        for shape in (SISO, MIMO, SSD):
            tokens, heads, state = jax.tree.map(jnp.asarray, draw(shape._replace(length=3)))
            tokens = tokens._replace(start_BL=jnp.zeros((2, 3), bool))
            for name in ("triton", "mosaic_tpu"):
                IMPLEMENTATIONS[name] = functools.partial(IMPLEMENTATIONS[name], interpret=True)
            for implementation in FLOAT32:
                op = functools.partial(ssm, rotation=shape.rotation, implementation=implementation)
                jax.eval_shape(op, tokens, heads, state)
        print("held")
    """)
    assert done.stdout == "held\n", done.stderr[-3000:]


def test_the_hook_is_on():
    done = run("discretize.later_weight(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 1)))")
    assert done.returncode != 0
    assert "TypeCheckError" in done.stderr, done.stderr[-3000:]
