"""Registers, spills and shared memory of every Triton kernel of the op, compiled for a GPU that need not be there.

    python -m experiments.benchmarks.registers                     the kernels of --case=siso, forward and backward
    python -m experiments.benchmarks.registers --case=mimo4 --sass=DIR

Half of what a profiler says, without the GPU: what does not fit in registers or in shared memory (an SM of Hopper has
228 KiB, so over 113 only one program runs on it), and how many instructions a kernel has. The kernel's program is taken
from the lowered call and compiled by the `triton` package, which has to be installed (`pip install triton`; it is none
of the project's requirements, and its version may differ a little from the one inside XLA). jax 0.11 or newer.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import jax
from absl import app, flags
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from experiments.benchmarks import common, ssm

FLAGS = flags.FLAGS
COLUMNS = {
    name: name for name in ("kernel", "warps", "stages", "registers", "spilled bytes", "shared KiB", "instructions")
}
CAPABILITY = 90  # Hopper


def kernels(task: ssm.Task) -> dict[str, dict]:
    """Return what the lowered call says of each of its Triton kernels, by name: `ir`, `num_warps`, `num_stages`."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=device)
    with use_abstract_mesh(mesh):
        traced = jax.jit(task.function()).trace(*jax.eval_shape(task.arguments))
        module = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    found = {}

    def visit(operation):
        if operation.name == "stablehlo.custom_call" and "triton" in str(operation.attributes["call_target_name"]):
            config = {attribute.name: attribute.attr for attribute in operation.attributes["mhlo.backend_config"]}
            found[str(config["name"]).strip('"')] = config
        for region in operation.regions:
            for block in region.blocks:
                for inner in block.operations:
                    visit(inner.operation)

    visit(module.operation)
    return found


def text_of(bytecode: bytes) -> str:
    """Return a kernel's program as text."""
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    with ir.Context() as context:
        dialect.register_dialect(context)
        context.allow_unregistered_dialects = True
        # Triton's own parser does not take a barrier's properties, of which it has none.
        return re.sub(r'"gpu\.barrier"\(\).*', "gpu.barrier", str(ir.Module.parse(bytecode)))


def measured(name: str, config: dict) -> tuple[dict, str]:
    """One row, and the machine code."""
    import triton.backends.nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile as compile_triton

    warps, stages = (int(str(config[key]).split(":")[0]) for key in ("num_warps", "num_stages"))
    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as folder:
        source, ptx, cubin = (Path(folder) / f"kernel.{end}" for end in ("ttir", "ptx", "cubin"))
        source.write_text(text_of(config["ir"].value_bytes))
        options = {"num_warps": warps, "num_stages": stages}
        compiled = compile_triton(str(source), target=GPUTarget("cuda", CAPABILITY, 32), options=options)
        ptx.write_text(compiled.asm["ptx"])
        assemble = [tools / "ptxas", "-v", f"--gpu-name=sm_{CAPABILITY}a", ptx, "-o", cubin]
        report = subprocess.run(assemble, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([tools / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    row = {
        "kernel": name,
        "warps": warps,
        "stages": stages,
        "registers": int(re.search(r"Used (\d+) registers", report).group(1)),
        "spilled bytes": int(re.search(r"(\d+) bytes spill stores", report).group(1)),
        "shared KiB": compiled.metadata.shared // 1024,
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)),
    }
    return row, sass


def main(argv):
    del argv
    (name,) = ssm.chosen("case", [FLAGS.case], ssm.CASES["gpu"])
    jax.config.update("jax_platforms", "cpu")
    what = "decode" if ssm.CASES["gpu"][name].length == 1 else "forward+backward"
    rows = []
    for kernel, config in kernels(ssm.Task(name, ssm.CASES["gpu"][name], "triton", what)).items():
        row, sass = measured(kernel, config)
        rows.append(row)
        if FLAGS.sass:
            Path(FLAGS.sass).mkdir(parents=True, exist_ok=True)
            (Path(FLAGS.sass) / f"{name}_{kernel}.sass").write_text(sass)
    print(common.table(rows, COLUMNS))


if __name__ == "__main__":
    flags.DEFINE_string("case", "siso", "a GPU case of experiments.benchmarks.ssm")
    flags.DEFINE_string("sass", "", "directory for the machine code; empty: none")
    app.run(main, flags_parser=common.parse)
