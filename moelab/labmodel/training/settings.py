"""The sizes of the lab model, and what a training run is made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """The sizes that make the lab model; names are those of `config.json`."""

    vocab_size: int = 6144
    hidden_size: int = 256
    num_hidden_layers: int = 8
    full_attention_interval: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    partial_rotary_factor: float = 0.5
    rope_theta: float = 10000.0
    linear_num_key_heads: int = 2
    linear_num_value_heads: int = 4
    linear_key_head_dim: int = 64
    linear_value_head_dim: int = 64
    linear_conv_kernel_dim: int = 4
    num_experts: int = 64
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 64
    shared_expert_intermediate_size: int = 64
    intermediate_size: int = 512
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6

    def config(self) -> dict[str, Any]:
        """Return `config.json` for mlx-lm, which wants these keys at its top level."""
        return {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            **asdict(self),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "hidden_act": "silu",
            "rope_scaling": None,
            "torch_dtype": "float32",
        }


@dataclass(frozen=True)
class Settings:
    """What a run is made of; stored beside the weights."""

    minutes: float = 18.0
    """Time budget; the schedules are stretched over it."""
    steps: int = 0
    """If not 0, the number of steps instead of a time budget."""
    sequences: int = 32
    """Sequences a step."""
    length: int = 1024
    """Tokens a sequence."""
    learning_rate: float = 2e-3
    """Peak, reached after `warmup`."""
    final_rate: float = 0.02
    """The last learning rate, as a share of the peak."""
    warmup: float = 0.02
    """Share of the budget."""
    weight_decay: float = 0.1
    """Of matrices; norms, decays and convolutions have none."""
    dropout: float = 0.1
    """On the embedding and on what each half of a layer adds."""
    balance: float = 0.003
    """Weight of the load-balancing loss, mean over layers."""
    quantise_from: float = 0.65
    """Share of the budget after which weights are fake-quantised."""
    seed: int = 0
    """Of weights, dropout and batches."""
    evaluate_every: float = 0.1
    """Held-out loss and a checkpoint, as a share of the budget."""
    compile: bool = False
    """Use torch.compile on the layers."""
