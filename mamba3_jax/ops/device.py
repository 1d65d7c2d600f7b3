"""Which device a program is for."""

import jax


def device():
    """Return a device of the mesh in context, or else of the process. Of a mesh only kind and platform are known."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
