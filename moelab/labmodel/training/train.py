"""The training loop: AdamW in float32, the model in bfloat16, sized by a time budget.

Schedules (learning rate, fake quantisation) follow the share of the budget that
has passed, be it minutes or steps, so the same command gives a finished model
on a GPU in minutes or on a CPU overnight. The last part trains on fake-quantised
weights. A run resumes from its last checkpoint, with the same batches.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from moelab.labmodel.training.batches import Batches
from moelab.labmodel.training.data import DOMAINS
from moelab.labmodel.training.model import LabModel
from moelab.labmodel.training.quantisation import bits_for, fake_quantise
from moelab.labmodel.training.settings import Architecture, Settings

#: The first steps compile and tune kernels, for minutes on a GPU; they are not budgeted.
_UNTIMED_STEPS = 3


class Trainer:
    """One run: model, optimiser, data and progress."""

    def __init__(
        self, out: Path, settings: Settings, device: str, architecture: Architecture | None = None
    ) -> None:
        """Set up, and resume from `out` if it holds a checkpoint.

        Args:
            out: Folder with `tokens.npz` and `selection.npz`; checkpoints go there.
            settings: Budget and hyperparameters.
            device: "cuda" or "cpu".
            architecture: Sizes of the model.
        """
        self.out, self.settings, self.device = out, settings, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        torch.manual_seed(settings.seed)
        self.architecture = architecture or Architecture()
        self.model = LabModel(self.architecture, settings.dropout).to(device)
        self.weights = dict(self.model.named_parameters())
        if settings.compile:
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
        self.batches = Batches(
            out / "tokens.npz", settings.length, self.architecture.vocab_size, settings.seed
        )
        self.held_out = dict(np.load(out / "selection.npz"))
        self.optimiser = torch.optim.AdamW(
            _decay_groups(self.weights, settings.weight_decay),
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            fused=device == "cuda",
        )
        self.step, self.elapsed = 0, 0.0
        self.log: list[dict[str, Any]] = []
        self._resume()

    @property
    def progress(self) -> float:
        """Share of the budget that has passed."""
        s = self.settings
        return self.step / s.steps if s.steps else self.elapsed / (60 * s.minutes)

    def run(self) -> None:
        """Train until the budget is spent, then write `final.pt`."""
        s, before, started, first = self.settings, self.elapsed, time.perf_counter(), self.step
        next_evaluation = self.progress + s.evaluate_every
        bar = tqdm(total=100.0, initial=100 * self.progress, unit="%", mininterval=5)
        with ThreadPoolExecutor(4) as pool:
            make = self.batches.batch
            waiting = [pool.submit(make, self.step + i, s.sequences) for i in range(6)]
            while self.progress < 1:
                ids = torch.from_numpy(waiting.pop(0).result()).to(self.device, non_blocking=True)
                waiting.append(pool.submit(make, self.step + 6, s.sequences))
                loss, load = self._update(ids)
                self.step += 1
                if self.step - first == _UNTIMED_STEPS:
                    loss.item()  # wait for the device
                    started = time.perf_counter()
                if self.step - first >= _UNTIMED_STEPS:
                    self.elapsed = before + time.perf_counter() - started
                bar.n = round(min(100.0, 100 * self.progress), 2)
                if self.step % 50 == 0:
                    shown = {"loss": f"{loss.item():.3f}", "load": f"{load.item():.2f}"}
                    bar.set_postfix(step=self.step, **shown)
                if self.progress >= next_evaluation:
                    next_evaluation += s.evaluate_every
                    self._report(loss, load)
                    self._save("last.pt")
        bar.close()
        if not self.log or self.log[-1]["step"] != self.step:
            self._report(loss, load)
        self._save("final.pt")

    def running_weights(self, quantise: bool) -> dict[str, Tensor]:
        """The weights that the model runs on: half precision, maybe on the 4-bit grid."""
        made = {}
        for name, weight in self.weights.items():
            bits = bits_for(name, weight) if quantise else None
            value = fake_quantise(weight, bits) if bits else weight
            exact = name.endswith(("A_log", "dt_bias"))
            made[name] = value if exact else value.to(self.dtype)
        return made

    def evaluate(self, quantise: bool) -> dict[str, float]:
        """Bits per byte of the selection texts, by domain."""
        self.model.eval()
        with torch.no_grad():
            weights = self.running_weights(quantise)
        figures = {}
        for domain in DOMAINS:
            ids = torch.from_numpy(self.held_out[f"{domain}/ids"].astype(np.int64)).to(self.device)
            real = ids >= 0
            with torch.no_grad():
                logits, _ = functional_call(self.model, weights, (ids.clamp_min(0)[:, :-1],))
            each = F.cross_entropy(
                logits.float().transpose(1, 2), ids[:, 1:].clamp_min(0), reduction="none"
            )
            nats = float((each * real[:, 1:]).sum())
            figures[domain] = nats / math.log(2) / float(self.held_out[f"{domain}/bytes"])
        self.model.train()
        return figures

    def _update(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        s = self.settings
        rate = s.learning_rate * _schedule(self.progress, s)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        weights = self.running_weights(self.progress >= s.quantise_from)
        logits, loads = functional_call(self.model, weights, (ids[:, :-1],))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        (loss + s.balance * loads.mean()).backward()
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss.detach(), loads.detach().max()

    def _report(self, loss: Tensor, load: Tensor) -> None:
        quantise = self.progress >= self.settings.quantise_from
        record: dict[str, Any] = {
            "step": self.step,
            "minutes": round(self.elapsed / 60, 2),
            "tokens": self.step * self.settings.sequences * self.settings.length,
            "loss": round(loss.item(), 4),
            "load": round(load.item(), 3),
            "quantised": quantise,
            **{k: round(v, 4) for k, v in self.evaluate(quantise).items()},
        }
        self.log.append(record)
        (self.out / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in self.log))
        tqdm.write(json.dumps(record))

    def _save(self, name: str) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
            "log": self.log,
            "settings": asdict(self.settings),
            "architecture": asdict(self.architecture),
        }
        with _whole(self.out / name) as temporary:
            torch.save(state, temporary)

    def _resume(self) -> None:
        path = self.out / "last.pt"
        if path.exists():
            state = torch.load(path, map_location=self.device, weights_only=True)
            if state["architecture"] != asdict(self.architecture):
                raise ValueError(f"{path} is of another architecture: remove it to start afresh")
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, self.elapsed, self.log = state["step"], state["elapsed"], state["log"]


def _schedule(progress: float, s: Settings) -> float:
    """Warm up, stay, and fall linearly over the second half of the budget."""
    if progress < s.warmup:
        return max(progress / s.warmup, 0.01)
    fall = min(1.0, max(0.0, (progress - 0.35) / 0.65))
    return 1.0 - (1.0 - s.final_rate) * fall


def _decay_groups(weights: dict[str, nn.Parameter], decay: float) -> list[dict[str, Any]]:
    matrices = [w for n, w in weights.items() if w.dim() >= 2 and "conv1d" not in n]
    others = [w for n, w in weights.items() if w.dim() < 2 or "conv1d" in n]
    return [
        {"params": matrices, "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Write to a temporary name first: a checkpoint appears whole or not at all."""
    temporary = path.with_suffix(".part")
    yield temporary
    temporary.replace(path)
