"""A PyTorch twin of mlx-lm's `qwen3_next`, small and quick to train.

The same arithmetic and the same parameter names as `transformers`'
`Qwen3NextForCausalLM`, without caches (a test compares it with that and with
mlx-lm's): three of four layers are gated delta nets, the fourth attends, and
every layer ends in a mixture of experts beside a shared expert. What it adds is
what training wants: dropout, the balance loss, grouped matrix products in half
precision, and the fused delta rule of flash-linear-attention where there is one.

Weights are kept in float32; `train` runs the model on a half-precision,
possibly fake-quantised copy by way of `torch.func.functional_call`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelab.labmodel.training.delta import delta_rule
from moelab.labmodel.training.settings import Architecture


class ZeroCentredNorm(nn.Module):
    """RMS norm whose weight is stored less one."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return F.rms_norm(x, x.shape[-1:], (1.0 + self.weight.float()).to(x.dtype), self.eps)


class GatedNorm(nn.Module):
    """RMS norm multiplied by a SiLU gate."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Normalise the last axis and gate it."""
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps) * F.silu(gate)


class Attention(nn.Module):
    """Causal attention with grouped heads, partial RoPE and an output gate."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.heads, self.kv_heads = a.num_attention_heads, a.num_key_value_heads
        self.size = a.head_dim
        self.rotary, self.theta = int(a.head_dim * a.partial_rotary_factor), a.rope_theta
        self.q_proj = nn.Linear(a.hidden_size, 2 * self.heads * self.size, bias=False)
        self.k_proj = nn.Linear(a.hidden_size, self.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(a.hidden_size, self.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.size, a.hidden_size, bias=False)
        self.q_norm = ZeroCentredNorm(self.size, a.rms_norm_eps)
        self.k_norm = ZeroCentredNorm(self.size, a.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens: (batch, length, size) to the same."""
        batch, length, _ = x.shape
        q, gate = self.q_proj(x).view(batch, length, self.heads, 2 * self.size).chunk(2, -1)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.size)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        q, k = (self._rope(t.transpose(1, 2)) for t in (self.q_norm(q), self.k_norm(k)))
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out = out.transpose(1, 2).reshape(batch, length, -1)
        return self.o_proj(out * torch.sigmoid(gate.reshape(batch, length, -1)))

    def _rope(self, x: Tensor) -> Tensor:
        half = self.rotary // 2
        rate = self.theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angle = torch.arange(x.shape[-2], device=x.device)[:, None] * rate
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b, rest = x[..., :half], x[..., half : self.rotary], x[..., self.rotary :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


class DeltaNet(nn.Module):
    """Gated delta net: a short convolution, then a decaying associative memory."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.k_heads, self.v_heads = a.linear_num_key_heads, a.linear_num_value_heads
        self.k_size, self.v_size = a.linear_key_head_dim, a.linear_value_head_dim
        self.key, self.value = self.k_heads * self.k_size, self.v_heads * self.v_size
        channels = 2 * self.key + self.value
        self.conv1d = nn.Conv1d(
            channels, channels, a.linear_conv_kernel_dim, groups=channels, bias=False
        )
        self.in_proj_qkvz = nn.Linear(a.hidden_size, channels + self.value, bias=False)
        self.in_proj_ba = nn.Linear(a.hidden_size, 2 * self.v_heads, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(self.v_heads))
        self.A_log = nn.Parameter(torch.empty(self.v_heads).uniform_(0.01, 16).log())
        self.norm = GatedNorm(self.v_size, a.rms_norm_eps)
        self.out_proj = nn.Linear(self.value, a.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens: (batch, length, size) to the same."""
        batch, length, _ = x.shape
        each = self.v_heads // self.k_heads
        mixed = self.in_proj_qkvz(x).view(batch, length, self.k_heads, -1)
        wide = each * self.v_size
        q, k, v, z = mixed.split([self.k_size, self.k_size, wide, wide], -1)
        b, a = self.in_proj_ba(x).view(batch, length, self.k_heads, -1).split([each, each], -1)
        qkv = torch.cat([t.reshape(batch, length, -1) for t in (q, k, v)], -1)
        kernel = self.conv1d.weight
        qkv = F.pad(qkv.transpose(1, 2), (kernel.shape[-1] - 1, 0))
        qkv = F.conv1d(qkv, kernel, groups=kernel.shape[0])
        q, k, v = F.silu(qkv.transpose(1, 2)).split([self.key, self.key, self.value], -1)
        q, k = (t.reshape(batch, length, self.k_heads, self.k_size) for t in (q, k))
        v = v.reshape(batch, length, self.v_heads, self.v_size)
        b, a = b.reshape(batch, length, -1), a.reshape(batch, length, -1)
        decay = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())
        out = delta_rule(q, k, v, decay, torch.sigmoid(b))
        out = self.norm(out, z.reshape(batch, length, self.v_heads, self.v_size))
        return self.out_proj(out.reshape(batch, length, -1))


class Router(nn.Module):
    """The gate of a mixture: a score for every expert."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(a.num_experts, a.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Score every expert: (tokens, size) to (tokens, experts)."""
        return F.linear(x, self.weight).float()


class Experts(nn.Module):
    """All experts of a layer, gate and up projections stacked as `transformers` does."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        wide = a.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.zeros(a.num_experts, 2 * wide, a.hidden_size))
        self.down_proj = nn.Parameter(torch.zeros(a.num_experts, a.hidden_size, wide))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Run each token through its experts and add up their weighted outputs."""
        top = ids.shape[-1]
        order = ids.flatten().argsort()
        ends = _chosen(ids, self.gate_up_proj.shape[0]).cumsum(0).to(torch.int32)
        gate, up = _grouped(x[order // top], self.gate_up_proj, ends).chunk(2, -1)
        out = _grouped(F.silu(gate) * up, self.down_proj, ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=x.device)
        return (out[back].view(x.shape[0], top, -1) * weights[..., None]).sum(1)


class GatedMLP(nn.Module):
    """The shared expert."""

    def __init__(self, size: int, wide: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, wide, bias=False)
        self.up_proj = nn.Linear(size, wide, bias=False)
        self.down_proj = nn.Linear(wide, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the expert to every token."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Mixture(nn.Module):
    """Top-k experts with normalised weights, plus a gated shared expert."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.top = a.num_experts_per_tok
        self.gate = Router(a)
        self.experts = Experts(a)
        self.shared_expert = GatedMLP(a.hidden_size, a.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(a.hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixture's output and its balance loss."""
        flat = x.reshape(-1, x.shape[-1])
        scores = self.gate(flat).softmax(-1)
        weights, ids = scores.topk(self.top, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = self.experts(flat, ids, weights)
        out = out + torch.sigmoid(self.shared_expert_gate(flat)) * self.shared_expert(flat)
        return out.view_as(x), balance(scores, ids)


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, a: Architecture, index: int, dropout: float) -> None:
        super().__init__()
        self.is_linear = (index + 1) % a.full_attention_interval != 0
        if self.is_linear:
            self.linear_attn = DeltaNet(a)
        else:
            self.self_attn = Attention(a)
        self.mlp = Mixture(a)
        self.input_layernorm = ZeroCentredNorm(a.hidden_size, a.rms_norm_eps)
        self.post_attention_layernorm = ZeroCentredNorm(a.hidden_size, a.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's output and its balance loss."""
        mixer = self.linear_attn if self.is_linear else self.self_attn
        x = x + self.dropout(mixer(self.input_layernorm(x)))
        out, load = self.mlp(self.post_attention_layernorm(x))
        return x + self.dropout(out), load


class LabModel(nn.Module):
    """The whole model: token ids to logits and each layer's balance loss."""

    def __init__(self, a: Architecture, dropout: float = 0.0) -> None:
        super().__init__()
        self.architecture = a
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(a.vocab_size, a.hidden_size)
        self.model.layers = nn.ModuleList(Layer(a, i, dropout) for i in range(a.num_hidden_layers))
        self.model.norm = ZeroCentredNorm(a.hidden_size, a.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)
        self._initialise()

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and the balance loss of each layer."""
        x = self.dropout(self.model.embed_tokens(ids))
        loads = []
        for layer in self.model.layers:
            x, load = layer(x)
            loads.append(load)
        # The embedding is tied: the same (fake-quantised) weight makes the logits.
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight), torch.stack(loads)

    def _initialise(self) -> None:
        """Normal weights; what writes to the residual stream starts smaller."""
        deep = (2 * self.architecture.num_hidden_layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.dim() >= 2 and "conv1d" not in name:
                std = 0.02 if "embed" in name else weight.shape[-1] ** -0.5
                if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                    std *= deep
                if name.endswith("experts.down_proj"):
                    std *= deep
                if name.endswith(".gate.weight"):
                    std *= 0.2  # no expert is favoured by chance
                nn.init.normal_(weight, std=std)


def balance(scores: Tensor, ids: Tensor) -> Tensor:
    """Switch Transformer's balance loss over the whole batch: 1 where loads are even.

    Judged over a batch that mixes all domains, not a sequence at a time, it
    leaves the router free to give each domain its own experts.
    """
    experts = scores.shape[-1]
    share = _chosen(ids, experts).float() / ids.numel()
    return experts * (share * scores.mean(0)).sum()


def _chosen(ids: Tensor, experts: int) -> Tensor:
    """How often each expert was chosen, without a synchronisation."""
    one = torch.ones_like(ids.flatten(), dtype=torch.int32)
    return one.new_zeros(experts).scatter_add_(0, ids.flatten(), one)


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows sorted by expert, each times its own expert's matrix."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    spans = pairwise([0, *ends.tolist()])
    return torch.cat([F.linear(x[a:b], w) for (a, b), w in zip(spans, weight, strict=True)])
