"""Official PyTorch checkpoints (`state-spaces/mamba`, `MambaLMHeadModel`) <-> our config and parameters.

names.py      the one table of tensor names, and the layout of each
config.py     config.json <-> ModelConfig
ssm_cfg.py    what its ssm_cfg says, by official class of layers
torch_zip.py  pytorch_model.bin without torch
shards.py     what is no file of its kind, and files in shards
peel.py       wrappers, prefixes and buffers around the official tensors
files.py      a directory read or written whole
"""

from mamba3_jax.convert.config import from_official, to_official
from mamba3_jax.convert.files import Origin, is_official, read, write
from mamba3_jax.convert.names import to_params, to_state_dict

__all__ = ["Origin", "from_official", "is_official", "read", "to_official", "to_params", "to_state_dict", "write"]
