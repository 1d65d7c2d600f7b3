"""The official language model of Mamba-2 and attention layers in float64, token by token, from the official tensors.

It reads official names alone, and no table of ours: what a row of a tensor is stands here a second time.
"""

import numpy as np

EPS = 1e-5


def silu(x):
    return x / (1 + np.exp(-x))


def normed(x, weight):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPS) * weight


def logits(tensors: dict, config: dict, tokens_BL):
    """(B, L, V): the residual stream takes in each mixer's and each feed-forward's output, of what is normed."""
    tensors = {name: array.astype(np.float64) for name, array in tensors.items()}
    x_BLD = tensors["backbone.embedding.weight"][tokens_BL]
    for index in range(config["n_layer"]):
        prefix = f"backbone.layers.{index}."
        layer = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        mixer = {name.removeprefix("mixer."): x for name, x in layer.items() if name.startswith("mixer.")}
        attends = index in config["attn_layer_idx"]
        mixed, said = (attention, config["attn_cfg"]) if attends else (mamba2, config["ssm_cfg"])
        u_BLD = normed(x_BLD, layer["norm.weight"])
        x_BLD = x_BLD + np.stack([mixed(mixer, said, u_LD) for u_LD in u_BLD])
        up, gate = np.split(normed(x_BLD, layer["norm2.weight"]) @ layer["mlp.fc1.weight"].T, 2, axis=-1)
        x_BLD = x_BLD + up * silu(gate) @ layer["mlp.fc2.weight"].T
    return normed(x_BLD, tensors["backbone.norm_f.weight"]) @ tensors["lm_head.weight"].T


def mamba2(p: dict, said: dict, u_LD):
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,  y_t = h_t C_t + D x_t,  out = W RMSNorm(y silu(z)), each group's."""
    groups, d_state, width, heads = said["ngroups"], said["d_state"], said["headdim"], len(p["D"])
    inner, shared = heads * width, groups * d_state
    z_LI, xbc_LE, dt_LH = np.split(u_LD @ p["in_proj.weight"].T, [inner, 2 * inner + 2 * shared], axis=1)
    taps_EK = p["conv1d.weight"][:, 0]
    taps = taps_EK.shape[1]
    padded = np.concatenate([np.zeros((taps - 1, xbc_LE.shape[1])), xbc_LE])
    dt_LH = np.log1p(np.exp(dt_LH + p["dt_bias"]))
    h_HPN, y_LI = np.zeros((heads, width, d_state)), np.zeros_like(z_LI)
    for t in range(len(u_LD)):
        seen_EK = padded[t : t + taps].T  # the oldest token first, token t last
        xbc_E = silu((seen_EK * taps_EK).sum(axis=1) + p["conv1d.bias"])
        x_HP = xbc_E[:inner].reshape(heads, width)
        b_GN = xbc_E[inner : inner + shared].reshape(groups, d_state)
        c_GN = xbc_E[inner + shared :].reshape(groups, d_state)
        for head in range(heads):
            group = head // (heads // groups)
            h_HPN[head] *= np.exp(-dt_LH[t, head] * np.exp(p["A_log"][head]))
            h_HPN[head] += dt_LH[t, head] * np.outer(x_HP[head], b_GN[group])
            y_P = h_HPN[head] @ c_GN[group] + p["D"][head] * x_HP[head]
            y_LI[t, head * width : (head + 1) * width] = y_P
    gated_LGI = (y_LI * silu(z_LI)).reshape(len(u_LD), groups, -1)
    return normed(gated_LGI, p["norm.weight"].reshape(groups, -1)).reshape(y_LI.shape) @ p["out_proj.weight"].T


def attention(p: dict, said: dict, u_LD):
    """Causal softmax attention without positions or biases; in_proj is q | k | v, and kv heads are shared in turn."""
    heads, kv_heads = said["num_heads"], said["num_heads_kv"]
    width = u_LD.shape[1] // heads
    q, k, v = np.split(u_LD @ p["in_proj.weight"].T, np.cumsum([heads * width, kv_heads * width]), axis=1)
    out = []
    for head in range(heads):
        own, kv = (slice(n * width, (n + 1) * width) for n in (head, head // (heads // kv_heads)))
        scores_LL = q[:, own] @ k[:, kv].T / np.sqrt(width)
        weights_LL = np.tril(np.exp(scores_LL))
        out.append(weights_LL / weights_LL.sum(axis=1, keepdims=True) @ v[:, kv])
    return np.concatenate(out, axis=1) @ p["out_proj.weight"].T
