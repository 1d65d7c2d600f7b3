"""Convert official PyTorch checkpoints (`MambaLMHeadModel` of `state-spaces/mamba`) to config and parameters, and back.

names.py      the one table of tensor names, and the layout of each tensor
config.py     config.json <-> ModelConfig
ssm_cfg.py    its ssm_cfg, for each official class of layers
torch_zip.py  pytorch_model.bin without torch
shards.py     sharded files, and files that are not what their name says
peel.py       wrappers, prefixes and buffers around the official tensors
files.py      reads and writes whole directories
"""

from mamba3_jax.convert.config import from_official, to_official
from mamba3_jax.convert.files import Origin, is_official, read, write
from mamba3_jax.convert.names import to_params, to_state_dict

__all__ = ["Origin", "from_official", "is_official", "read", "to_official", "to_params", "to_state_dict", "write"]
