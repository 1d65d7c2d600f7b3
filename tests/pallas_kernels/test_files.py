"""How many files one opens to follow the op's forward pass: pallas_kernels/ssm/README.md lists them."""

import functools
import importlib
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mamba3_jax.ops import ssm
from mamba3_jax.ops.kernels import BACKENDS, kernels
from pallas_kernels.ssm.cases import MIMO
from tests.ops.cases import bfloat16, draw

ROOT = Path(__file__).parent.parent.parent
SHAPE = MIMO._replace(batch=1, length=530, heads=2, d_state=50, width=24, planes=5, norm=False)


def files_of(run, *inputs) -> set[str]:
    """The files of ours with a function that runs while `run` is traced, named tuples' own aside."""
    found = set()

    def seen(frame, event, argument):
        del argument
        if event == "call" and not frame.f_code.co_name.startswith("<"):
            found.add(frame.f_code.co_filename)

    sys.setprofile(seen)
    try:
        jax.eval_shape(run, *inputs)
    finally:
        sys.setprofile(None)
    folders = (ROOT / "mamba3_jax", ROOT / "pallas_kernels")
    return {Path(name).stem for name in found if any(folder in Path(name).parents for folder in folders)}


@pytest.mark.quick
def test_the_readme_lists_the_files_of_a_forward_pass(monkeypatch):
    """On a Hopper GPU, packed and in splits, from a state."""
    run = functools.partial(kernels, backend="mosaic_gpu", interpret=True)
    monkeypatch.setitem(ssm.IMPLEMENTATIONS, "mosaic_gpu", run)
    tokens, heads, state = draw(SHAPE)
    tokens = bfloat16(tokens)._replace(start_BL=jnp.zeros((1, SHAPE.length), bool))
    op = functools.partial(ssm.ssm, rotation=SHAPE.rotation, implementation="mosaic_gpu")
    importlib.import_module(BACKENDS["mosaic_gpu"])  # what runs then is not the forward pass
    found = files_of(op, tokens, heads, state)
    text = (ROOT / "pallas_kernels" / "ssm" / "README.md").read_text()
    section = text.partition("## Files to open")[2].partition("##")[0]
    listed = {name for line in section.splitlines() if line.startswith("    ") for name in line.split()[1:]}
    assert found == listed
    assert re.search(rf"\*\*{len(found)}\*\*", section)
