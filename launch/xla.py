"""Set how XLA compiles for a command: flags by device, each with its reason, and where compiled programs are kept."""

import os
import tempfile
from pathlib import Path

import jax

# Every flag exists in jaxlib 0.10.2 and in 0.11.2: XLA ends the process at a flag that it does not know.
FLAGS = {
    "gpu": {
        # Collectives run beside what does not wait for them (JAX's "GPU performance tips"; NVIDIA's images set it).
        "xla_gpu_enable_latency_hiding_scheduler": "true",
        # This fusion takes the slice of the stacked layers into the scan's kernel, which then runs a second time in
        # every layer: on an H200 3.1 ms of a step of 169 (180M SISO), 16.5 of 262 (MIMO).
        "xla_gpu_enable_dynamic_slice_fusion": "false",
        # Whether Triton or cuBLAS computes a product stays the autotuner's choice (xla_gpu_triton_gemm_any would have
        # it try Triton for more of them): the layers' products ran at 652 TFLOP/s like this.
    },
    "tpu": {},
    "cpu": {},
}
DEVICES = Path("/dev")
CACHE_BYTES = 4 * 2**30  # a training step is 1 to 20 MB: some hundred runs; what was unused for longest is removed


def platform() -> str:
    """Return the platform that jax will take, without asking jax, which would start a backend."""
    if named := os.environ.get("JAX_PLATFORMS", "").split(",")[0].strip().lower():
        return {"cuda": "gpu"}.get(named, named)
    if any(DEVICES.glob("nvidia[0-9]*")):
        return "gpu"
    return "tpu" if any(DEVICES.glob("accel[0-9]*")) or any(DEVICES.glob("vfio/[0-9]*")) else "cpu"


def set_flags() -> None:
    """Add the platform's flags to XLA_FLAGS, except those that it sets already."""
    given = os.environ.get("XLA_FLAGS", "").split()
    there = {flag.lstrip("-").split("=")[0] for flag in given}
    ours = FLAGS.get(platform(), {}).items()
    if added := [f"--{name}={value}" for name, value in ours if name not in there]:
        os.environ["XLA_FLAGS"] = " ".join([*given, *added])


def cache_folder() -> Path:
    """Return this user's folder of compiled programs; RuntimeError where there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mamba3_jax"


def use_cache(warn) -> None:
    """Keep compiled programs between starts: in JAX_COMPILATION_CACHE_DIR if it is set, else in `cache_folder`.

    Only the latter is bounded in size. JAX's own variables win. Where the folder cannot be written, the command
    compiles without a cache, and `warn(line)` says so.
    """
    if not jax.config.jax_enable_compilation_cache:
        return
    own = not jax.config.jax_compilation_cache_dir
    try:
        folder = cache_folder() if own else Path(jax.config.jax_compilation_cache_dir)
        if own or "://" not in str(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # programs in it are run: nobody else may write there
            tempfile.TemporaryFile(dir=folder).close()
        if own:
            _drop_unfinished(folder)
    except (OSError, RuntimeError) as error:
        jax.config.update("jax_enable_compilation_cache", False)
        warn(f"compiled programs are not kept: {error}")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Keep quickly compiled ones too: a small program is read in a millisecond or two, a tenth of its compile time.
    _unless_set("jax_persistent_cache_min_compile_time_secs", 0.0)
    if own:  # JAX can bound only a cache that it has bounded from the beginning
        _unless_set("jax_compilation_cache_max_size", CACHE_BYTES)


def _unless_set(option: str, value) -> None:
    """Set an option of jax unless its environment variable does."""
    if option.upper() not in os.environ:
        jax.config.update(option, value)


def _drop_unfinished(folder: Path) -> None:
    """Remove programs without a time of last use: JAX writes it after the program, and was killed in between.

    JAX would neither write such a program again nor, as long as its time is missing, any other.
    """
    for program in folder.glob("*-cache"):
        if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
            program.unlink(missing_ok=True)
