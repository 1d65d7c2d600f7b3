"""The TPU compiler on hosts without TPUs: how it is loaded, what the chips can do, and topologies to compile for.

    pip install --target=build/libtpu "libtpu==0.0.42.*"      with jax 0.10; 0.0.48.* with jax 0.11

The compiler may also be installed as usual. In build/libtpu, where `make test` puts it, no other program sees it.
"""

import dataclasses
import math
import os
import re
import sys

import jax

from launch.provenance import REPOSITORY
from mamba3_jax.train.flops import PEAK_TFLOPS

# Set before libtpu is loaded: there is no TPU to ask, and another process may have loaded it too.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
# Outside of the Python environment: wherever libtpu can be imported, every JAX program looks for a TPU.
LIBTPU = REPOSITORY / "build" / "libtpu"
DEVICES = 2**17  # at most, in a topology: no pod is as large, and every device takes the compiler time


@dataclasses.dataclass(frozen=True)
class Chip:
    """Public figures of one device, as JAX counts devices; source: cloud.google.com/tpu/docs, one page a generation."""

    topology: str
    tera_flops: float  # bf16
    gb_s: float
    hbm_gb: float  # GiB of HBM; on v5e the compiler leaves programs a quarter of a GiB less
    # What the device can send over all of its links at once, and receive: half of what the pages call bidirectional.
    ici_gb_s: float
    # What it can send over the data center's network, to other slices; the pages of v5e and v6e have it for 256 chips.
    dcn_gb_s: float | None = None
    # The peak over what the four 128 x 128 units of a core do in a cycle, of v4, v5e and v5p; None: not known.
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
    """Set this process up to compile for TPUs, of which it has none; return the compiler's version.

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
    # JAX would write programs for chips that are not there to its cache, and could not read them back.
    jax.config.update("jax_enable_compilation_cache", False)
    return libtpu.__version__


def chip_of(topology: str) -> Chip:
    """Return the chip of a topology such as "v5e:16x16" or "2xv5e:16x16".

    Raises:
        ValueError: a chip that is not in `CHIPS`, or several slices of one whose speed between slices is not known.
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
        topology: the chip and the sides of its grid, "v5e:16x16"; for several slices how many first, "2xv5e:16x16".
        how: further options of `jax.experimental.topologies.get_topology_desc`.

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
