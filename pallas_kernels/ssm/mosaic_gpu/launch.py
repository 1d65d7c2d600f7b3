"""How kernels are launched: arrays in trees, one program a point of the grid."""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def call(kernel, name: str, inputs, out, scratch, grid: dict[str, int], interpret, *, sums: bool = True):
    """Runs `kernel(inputs, out, *scratch)`, trees of refs, for every point of the grid, whose last axis runs fastest.

    Args:
        out: a tree of shapes and dtypes, returned as arrays.
        scratch: trees of what a program has in shared memory, and its barriers.
        grid: sizes by name; programs ask for their place by `lax.axis_index(name)`.
        interpret: plgpu's InterpretParams: on the CPU, for tests; None: on the GPU.
        sums: whether the kernel adds up within warps, and nowhere else.
    """
    arrays, tree = jax.tree.flatten(inputs)
    out_types, out_tree = jax.tree.flatten(out)

    def body(*refs):
        inputs, out = jax.tree.unflatten(tree, refs[: len(arrays)]), jax.tree.unflatten(out_tree, refs[len(arrays) :])
        pl.run_scoped(functools.partial(kernel, inputs, out), *scratch)

    outputs = plgpu.kernel(
        body,
        out_type=out_types,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # commit_smem stands wherever warps exchange something
            **({"reduction_scratch_bytes": 512} if sums else {}),
        ),
        kernel_name=name,
        **({} if interpret is None else {"interpret": interpret}),
    )(*arrays)
    return jax.tree.unflatten(out_tree, outputs)
