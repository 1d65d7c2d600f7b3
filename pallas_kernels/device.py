"""Which device a program is for."""

import jax


def target():
    """Return the device that what is traced is for: of the mesh in context, or else the first of this process.

    Of a mesh whose devices this process does not have, a topology's say, only kind and platform are known.
    """
    wanted = jax.sharding.get_abstract_mesh().abstract_device
    here = jax.devices()
    return next((device for device in here if wanted is None or device.device_kind == wanted.device_kind), wanted)
