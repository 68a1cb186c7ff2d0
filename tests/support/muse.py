"""Plain MLX in place of muse_spark's Metal kernels, so that its model runs on a CPU.

Not the kernels' bits, which nothing here compares with: both sides of a test use these.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

F32 = mx.float32


def _norm(x: mx.array, eps: float) -> mx.array:
    return mx.fast.rms_norm(x.astype(F32), None, eps)


def expert_routing(
    logits: mx.array,
    expert_bias: mx.array,
    *,
    top_k: int,
    multiplier: float,
    score_eps: float,
    route_scale: float,
) -> list[mx.array]:
    """Experts by biased sigmoid; weights are the unbiased scores, normalised."""
    scores = mx.sigmoid(logits * multiplier)
    chosen = mx.argsort(-(scores + expert_bias), axis=-1)[..., :top_k].astype(mx.uint32)
    weights = mx.take_along_axis(scores, chosen, axis=-1)
    return [chosen, weights / (weights.sum(-1, keepdims=True) + score_eps) * route_scale]


def post_expert_norm_combine(
    experts: mx.array, weights: mx.array, *, norm_weight: mx.array, eps: float
) -> mx.array:
    """Normalises each expert's output and adds them with their weights."""
    normed = _norm(experts.astype(F32) * norm_weight.astype(F32), eps)
    return (normed * weights[..., None]).sum(axis=-2).astype(experts.dtype)


def qk_norm(
    qkvg: mx.array,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    eps: float,
    query_scale: float,
) -> list[mx.array]:
    """Queries and keys, (batch, length, heads, width), normalised."""
    rows, length, _ = qkvg.shape
    both = qkvg[..., : (n_heads + n_kv_heads) * head_dim].reshape(rows, length, -1, head_dim)
    normed = _norm(both, eps)
    queries, keys = normed[:, :, :n_heads] * query_scale, normed[:, :, n_heads:]
    return [queries.astype(qkvg.dtype), keys.astype(qkvg.dtype)]


def qk_norm_rope(
    qkvg: mx.array, *, rope_base: float, offset: Any, **options: Any
) -> list[mx.array]:
    """The same, turned by position."""

    def turned(x: mx.array) -> mx.array:
        heads = x.transpose(0, 2, 1, 3)
        width = x.shape[-1]
        return mx.fast.rope(
            heads, width, traditional=True, base=rope_base, scale=1.0, offset=offset
        ).transpose(0, 2, 1, 3)

    return [turned(x) for x in qk_norm(qkvg, **options)]


def rms_norm_sigmoid_gate(x: mx.array, gate: mx.array, *, eps: float) -> mx.array:
    """(batch, heads, length, width), normalised and gated, heads side by side."""
    rows, _, length, _ = x.shape
    normed = _norm(x, eps).transpose(0, 2, 1, 3).reshape(rows, length, -1)
    return (normed * mx.sigmoid(gate.astype(F32))).astype(x.dtype)


def norm_add_norm(
    branch: mx.array,
    stream: mx.array,
    *,
    alpha: mx.array,
    beta: mx.array,
    post_weight: mx.array | None,
    post_eps: float,
    next_norm: Any,
) -> tuple[mx.array, mx.array | None]:
    """Normalises a branch, adds it to the stream and normalises the sum."""
    scaled = branch if post_weight is None else branch * post_weight.astype(branch.dtype)
    summed = alpha * stream + beta * _norm(scaled, post_eps)
    return summed, None if next_norm is None else pre_norm(summed, next_norm, dtype=branch.dtype)


def pre_norm(stream: mx.array, norm: Any, *, dtype: mx.Dtype) -> mx.array:
    """Normalises the stream."""
    return (_norm(stream, norm.eps) * norm.weight.astype(F32)).astype(dtype)


KERNELS = (
    expert_routing, norm_add_norm, post_expert_norm_combine, pre_norm, qk_norm, qk_norm_rope,
    rms_norm_sigmoid_gate,
)  # fmt: skip
