"""The gated delta rule: how a delta net writes to and reads from its memory.

Two ways to the same result: flash-linear-attention's Triton kernels where they
are installed and there is a GPU, and plain PyTorch for everything else.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """Run the gated delta rule: the fused kernel on a GPU, else plain PyTorch.

    Args:
        q: Queries, (batch, length, key heads, key size), not normalised.
        k: Keys, like `q`.
        v: Values, (batch, length, value heads, value size).
        decay: Logarithm of the factor by which the memory decays, (batch, length, value heads).
        beta: How much of a value is written, like `decay`.

    Returns:
        What the memory answers, in the shape of `v`.
    """
    each = v.shape[2] // k.shape[2]
    q, k = (t.repeat_interleave(each, 2) for t in (q, k))
    kernel = _fused_rule() if v.is_cuda else None
    if kernel is not None:
        out, _ = kernel(q, k, v, g=decay, beta=beta.to(q.dtype), use_qk_l2norm_in_kernel=True)
        return out
    return _chunked_rule(q, k, v, decay, beta)


@cache
def _fused_rule() -> Any:
    """flash-linear-attention's kernel, or None where it is not installed."""
    try:
        chunk: Any = import_module("fla.ops.gated_delta_rule.chunk")
    except ImportError:
        return None
    # On Hopper GPUs, Triton 3.4 to 3.7.0 compiles one kernel of the backward pass
    # wrongly, and the library refuses to run it. That step has no recurrence, so
    # it is stated here as batched matrix products instead.
    chunk.chunk_bwd_dqkwg = _backward_within_chunks
    return torch.compiler.disable(chunk.chunk_gated_delta_rule)


def _backward_within_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    h: Tensor,
    dh: Tensor,
    w: Tensor,
    g: Tensor,
    dv: Tensor,
    scale: float,
    chunk_size: int = 64,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, w and the cumulative decay, for whole chunks.

    Arguments are those of flash-linear-attention's function of this step: `h` are
    the memories before each chunk, `g` the cumulative decay in powers of two.
    """
    if q.shape[1] % chunk_size:
        raise ValueError(f"sequences must be multiples of {chunk_size} tokens, got {q.shape[1]}")
    return _chunk_gradients()(q, k, v, do, h, dh, g, dv, scale, chunk_size)


@cache
def _chunk_gradients() -> Any:
    return torch.compile(_plain_chunk_gradients, dynamic=False)


def _plain_chunk_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    h: Tensor,
    dh: Tensor,
    g: Tensor,
    dv: Tensor,
    scale: float,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, dtype = q.shape, q.dtype
    q, k, v, do, dv = (t.unflatten(1, (-1, size)).transpose(2, 3) for t in (q, k, v, do, dv))
    g = g.unflatten(1, (-1, size)).transpose(2, 3).float()
    h, dh = h.to(dtype), dh.to(dtype)
    last = g[..., -1:]
    d_scores = (do @ v.transpose(-1, -2)).float()
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    pair = (g[..., :, None] - g[..., None, :]).masked_fill(later, float("-inf")).exp2()
    d_scores = (d_scores * pair * scale).to(dtype)
    dq = (do @ h.transpose(-1, -2)).float() * (g.exp2() * scale)[..., None]
    dk = (v @ dh.transpose(-1, -2)).float() * (last - g).exp2()[..., None]
    dw = -(dv.to(dtype) @ h.transpose(-1, -2))
    d_last = (h.float() * dh.float()).sum((-1, -2)) * last[..., 0].exp2()
    d_last = d_last + (dk * k.float()).sum((-1, -2))
    dq = dq + (d_scores @ k).float()
    dk = dk + (d_scores.transpose(-1, -2) @ q).float()
    dg = (dq * q.float()).sum(-1) - (dk * k.float()).sum(-1)
    dg = torch.cat((dg[..., :-1], dg[..., -1:] + d_last[..., None]), -1)
    dq, dk, dw = (t.to(dtype).transpose(2, 3).reshape(shape) for t in (dq, dk, dw))
    return dq, dk, dw, dg.transpose(2, 3).reshape(shape[:3])


def _chunked_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, chunk: int = 64
) -> Tensor:
    """The delta rule, a chunk of tokens at a time (Gated Delta Networks, section 3)."""
    dtype, length = v.dtype, v.shape[1]
    q, k, v, decay, beta = (t.transpose(1, 2).float() for t in (q, k, v, decay, beta))
    q, k = (t * torch.rsqrt((t * t).sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    pad = -length % chunk
    q = q * q.shape[-1] ** -0.5
    q, k, v = (F.pad(t, (0, 0, 0, pad)).unflatten(2, (-1, chunk)) for t in (q, k, v))
    decay, beta = (F.pad(t, (0, pad)).unflatten(2, (-1, chunk)) for t in (decay, beta))
    total = decay.cumsum(-1)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    pair = (total[..., :, None] - total[..., None, :]).masked_fill(later, float("-inf")).exp()
    system = (k * beta[..., None]) @ k.transpose(-1, -2) * pair
    solve = torch.linalg.solve_triangular
    both = torch.cat((v * beta[..., None], k * (beta * total.exp())[..., None]), -1)
    both = solve(system, both, upper=False, unitriangular=True)
    values, reads = both.split([v.shape[-1], k.shape[-1]], -1)
    within = (q @ k.transpose(-1, -2)) * pair
    q = q * total.exp()[..., None]
    k = k * (total[..., -1:] - total).exp()[..., None]
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    out = []
    for i in range(q.shape[2]):
        new = values[:, :, i] - reads[:, :, i] @ state
        out.append(q[:, :, i] @ state + within[:, :, i] @ new)
        state = state * total[:, :, i, -1].exp()[..., None, None]
        state = state + k[:, :, i].transpose(-1, -2) @ new
    return torch.stack(out, 2).flatten(2, 3)[:, :, :length].transpose(1, 2).to(dtype)
