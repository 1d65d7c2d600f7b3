import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Half the time of the suite is the compiler's: machine code left unoptimised computes the same programs. A test of each
# family compiles as users do.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
