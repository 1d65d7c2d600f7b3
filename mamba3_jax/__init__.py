"""Mamba-3 in JAX: train, ablate, evaluate and decode.

    model, params = mamba3_jax.load("runs/text")                      # a workdir, or an official PyTorch directory
    logits_BLV, state = model.apply({"params": params}, tokens_BL)    # training, prefill and decoding are this call

Array names end in the letters of their axes; numbers have no such ending (`d_state`).

    B batch   L tokens   C chunks   Q tokens in a chunk   D model width   V vocabulary   F feed-forward width
    H heads   G groups of q/k   R MIMO rank (1 is SISO)   N state per head   P head width   S rotary pairs (planes)
    T attended tokens   E attention head width   K kv heads, candidates of sampling   I Mamba-1's channels
    Z splits of the length over programs or devices

With quaternions, S counts the groups of four entries that rotate together. Other letters are local to a file.

The paper's symbols (arXiv 2603.15569) and ours:

    C, B, x     q, k, v                     query, key, value of the recurrence
    Delta, A    dt, a; log_a = dt a < 0     step and decay rate (some rules have another log_a)
    lambda      sigmoid(logit), in [0, 1]   how much of a step is the current token's: inside ops.discretize only
    theta       angle = pi tanh(theta)      radians per unit dt; the running sum of dt angle rotates q and k
    D, z        skip, gate

    h_t = exp(log_a_t) (h_{t-1} + beta_t v_{t-1} k_{t-1}^T) + gamma_t v_t k_t^T,    y_t = h_t q_t

gamma weighs a token's own input, beta the previous token's. Both, and log_a, come from a discretization: a function of
(dt, a, logit) in the table `ops.discretize.DISCRETIZATIONS`, named by `ModelConfig.discretization`. The paper's is
exponential_trapezoidal: gamma = lambda dt, beta = (1 - lambda) dt. Where beta is None, a step adds its own input alone.

Public names: `load`, `Config` and `ModelConfig`; and `LanguageModel`, `init_params`, `ssm`, `transition` and `compose`,
which are imported when they are first used. Import everything else from its module: generate, ops, mixers, nn, data,
train, evaluate, analysis, convert, checkpoint.
"""

import importlib

from mamba3_jax.config import Config, ModelConfig
from mamba3_jax.load import load  # here and not in LAZY: the module of the same name would be found first

__all__ = ["Config", "LanguageModel", "ModelConfig", "compose", "init_params", "load", "ssm", "transition"]

LAZY = {
    "LanguageModel": "mamba3_jax.model",
    "init_params": "mamba3_jax.model",
    "compose": "mamba3_jax.ops.ssm",
    "ssm": "mamba3_jax.ops.ssm",
    "transition": "mamba3_jax.ops.ssm",
}


def __getattr__(name):
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(LAZY[name]), name)
