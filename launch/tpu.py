"""TPUs that need not be there: the compiler for them, what their chips can do, and topologies of them.

    pip install --target=build/libtpu "libtpu==0.0.42.*"      with jax 0.10; 0.0.48.* with jax 0.11

The compiler may be installed as usual too; in build/libtpu, where `make test` puts it, no other program sees it.
"""

import dataclasses
import math
import os
import re
import sys

import jax

from launch.provenance import REPOSITORY
from mamba3_jax.train.flops import PEAK_TFLOPS

# Before libtpu is loaded: there is no TPU to ask, and another process may have it loaded too.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
# Away from the environment: wherever libtpu can be imported, every JAX program looks for a TPU.
LIBTPU = REPOSITORY / "build" / "libtpu"


DEVICES = 2**17  # no pod is as large, and each takes the compiler's time


@dataclasses.dataclass(frozen=True)
class Chip:
    """Public figures of one device, as JAX counts devices; source: cloud.google.com/tpu/docs, one page a generation."""

    topology: str
    tera_flops: float  # bf16
    gb_s: float
    hbm_gb: float  # GiB of HBM; the compiler leaves programs a quarter of one less on v5e
    # What it can send over all of its links at once; as much comes in. Half of what the pages call bidirectional.
    ici_gb_s: float
    # Over the network of the data center, to other slices; of v5e and v6e the pages have that of a pod of 256 chips.
    dcn_gb_s: float | None = None
    # v4, v5e, v5p: the peak over what their four 128 x 128 units a core do a cycle; for the others no such figure.
    ghz: float | None = None


CHIPS = {  # v4 and tpu7x have two devices a chip here
    "v4": Chip("v4:1x1x1", PEAK_TFLOPS["TPU v4"] / 2, 1228 / 2, hbm_gb=32 / 2, ici_gb_s=300 / 2, ghz=1.05),
    "v5e": Chip("v5e:1x1", PEAK_TFLOPS["TPU v5 lite"], 819, hbm_gb=16, ici_gb_s=400 / 2, dcn_gb_s=25 / 8, ghz=1.5),
    "v5p": Chip("v5p:1x1x1", PEAK_TFLOPS["TPU v5"], 2765, hbm_gb=95, ici_gb_s=1200 / 2, dcn_gb_s=50 / 8, ghz=1.75),
    "v6e": Chip("v6e:1x1", PEAK_TFLOPS["TPU v6 lite"], 1640, hbm_gb=32, ici_gb_s=800 / 2, dcn_gb_s=100 / 8),
    "tpu7x": Chip(
        "tpu7x:1x1x1",
        tera_flops=PEAK_TFLOPS["TPU7x"],
        gb_s=7380 / 2,
        hbm_gb=192 / 2,
        ici_gb_s=1200 / 2 / 2,
        dcn_gb_s=100 / 8 / 2,
    ),
}


def prepare() -> str:
    """Make this process one that compiles for TPUs and has none; return the compiler's version.

    Raises:
        ValueError: there is no compiler; it says how to get it.
    """
    if str(LIBTPU) not in sys.path:
        sys.path.append(str(LIBTPU))
    try:
        import libtpu
    except ImportError:
        wanted = "0.0.42" if jax.__version_info__ < (0, 11) else "0.0.48"
        how = f'pip install --target={LIBTPU} "libtpu=={wanted}.*" (no TPU is needed)'
        raise ValueError(f"there is no libtpu, the compiler for TPUs: {how}") from None
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", ENVIRONMENT["JAX_PLATFORMS"])
    # What is compiled for a chip that is not there is written to a cache and cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    return libtpu.__version__


def chip_of(topology: str) -> Chip:
    """Return the chip that "v5e:16x16" or "2xv5e:16x16" is of.

    Raises:
        ValueError: one that is not in `CHIPS`, or several slices of one whose network between slices is not known.
    """
    slices, one = slices_of(topology)
    name = one.partition(":")[0]
    if name not in CHIPS:
        raise ValueError(f"topology={topology!r} begins with none of {', '.join(CHIPS)}: wanted, say, v5e:16x16")
    if slices > 1 and CHIPS[name].dcn_gb_s is None:
        known = ", ".join(name for name, chip in CHIPS.items() if chip.dcn_gb_s)
        raise ValueError(f"topology={topology!r}: what {name} sends to other slices is not known, only of {known}")
    return CHIPS[name]


def slices_of(topology: str) -> tuple[int, str]:
    """Return how many slices "2xv5e:16x16" has, and the topology of each."""
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(.*)", topology)
    return int(match.group(1) or 1), match.group(2)


def devices_of(topology: str, **how) -> list:
    """Return the devices of a topology that need not be there.

    Args:
        topology: the chip and the sides of its grid: "v5e:16x16", "v5p:4x4x4"; before them how many such slices.
        how: what the compiler may be told beside.

    Raises:
        ValueError: the compiler knows no such topology.
    """
    from jax.experimental import topologies

    chip_of(topology)
    slices, one = slices_of(topology)
    if slices * math.prod(map(int, re.findall(r"\d+", one.partition(":")[2]))) > DEVICES:
        raise ValueError(f"topology={topology!r} has more than {DEVICES} devices")
    how |= {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(one, platform="tpu", **how).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology={topology!r}: {error}") from None
