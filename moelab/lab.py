"""`Lab`: a model with a bounded expert bank."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx
import mlx.nn as nn

from .checkpoint.fingerprint import fingerprint
from .checkpoint.headers import TensorSpan
from .display import facts_html, facts_text, size
from .errors import ClosedError, MoelabError
from .experts.attach import Attachment, Reopen, all_parameters, arrays_in
from .experts.capacity import Capacity, fixed_capacities
from .experts.misses import MissAction, WrongSlot, checked_budget, resolve_action
from .experts.pins import check_room
from .families import SwitchSite
from .prompting import Prompt, Sampling, Template, recommended_sampling, to_tokens
from .routing.loop import output_unread
from .routing.steps import tokens_in

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse

    from .chat import Chat
    from .experts.budget import Budget
    from .routing.session import RecordingSession
    from .routing.steps import StepWatch

PREFILL_STEP = 2048
"""Prompt tokens a forward pass, as in mlx-lm."""


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes that a lab holds, by what they are for."""

    trunk: int
    """Everything but the routed experts: attention, embeddings, shared experts, routers."""
    slots: int
    """The expert bank."""
    resident_experts: int
    """Experts of layers that hold all of theirs and so are left stock."""
    low_bit: int = 0
    """Copies of experts at few bits, for the miss action `low_bit`."""

    @property
    def total(self) -> int:
        """Their sum."""
        return self.trunk + self.slots + self.resident_experts + self.low_bit


class Lab:
    """A model of which C experts a layer are in memory, made by `moelab.load`.

    Attributes:
        name: What the model was asked for by.
        path: Its folder.
        model: mlx-lm's model; any mlx-lm function that *runs* a model takes it.
        tokenizer: mlx-lm's tokenizer.
        config: The model's configuration.
        sites: The MoE layers.
        capacities: Slots of each MoE layer, in the order of `sites`.
        policy: Name of the replacement policy.
        pins: Experts that never leave, by layer.
        swap_budget: Experts a layer that may enter after a step of a lossy action; None for the
            layer's top-k.
        sampling: What the model recommends.
        budget: How the capacity follows from memory; None where the capacity was given.
    """

    def __init__(
        self,
        *,
        name: str,
        path: Path,
        model: nn.Module,
        tokenizer: Any,
        config: dict[str, Any],
        sites: Sequence[SwitchSite],
        capacities: Sequence[int],
        attachment: Attachment,
        spans: dict[str, TensorSpan],
        policy: str,
        pins: Mapping[int, frozenset[int]] | None = None,
        swap_budget: int | None = None,
        budget: Budget | None = None,
        reopen: Reopen,
    ) -> None:
        self.name = name
        self.path = path
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.sites = list(sites)
        self.capacities = list(capacities)
        self.policy = policy
        self.pins = dict(pins or {})
        self.swap_budget = swap_budget
        self.budget = budget
        self._reopen = reopen
        self.sampling = recommended_sampling(path)
        self._attachment = attachment
        self._spans = spans
        self._closed = False
        self._watch_last_layer()
        self.sessions: list[RecordingSession] = []
        """Recordings that are under way, outermost first; they keep this list themselves."""

    # -- running ---------------------------------------------------------------------------

    def stream(
        self,
        prompt: Prompt,
        max_tokens: int = 200,
        *,
        template: Template = "auto",
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        kv_bits: int | None = None,
        prompt_cache: list[Any] | None = None,
        prefill_step_size: int = PREFILL_STEP,
        **options: Any,
    ) -> Iterator[GenerationResponse]:
        """Generates text, a piece at a time.

        Args:
            prompt: Text, a list of messages, or token ids.
            max_tokens: Tokens to generate at most; -1 for no limit.
            template: `"auto"` takes text as a chat turn where the tokenizer has a template;
                False takes it as it is.
            temperature: 0 takes the most likely token. This and the next four: what the model
                recommends, unless given.
            top_p: Smallest set of tokens with this much probability.
            top_k: So many likeliest tokens; 0 for all.
            min_p: Least probability, as a share of the likeliest token's.
            repetition_penalty: 1 for none.
            seed: Seeds MLX's random numbers.
            kv_bits: Bits of the key-value cache: 8, 4 or None for the model's own type.
            prompt_cache: mlx-lm's cache to go on from; it is changed.
            prefill_step_size: Prompt tokens a forward pass. More tokens share each expert read.
            **options: More options of `mlx_lm.generate.generate_step`.

        Yields:
            mlx-lm's `GenerationResponse`: `text`, `token`, `logprobs`, counts and speeds.

        Raises:
            ValueError: If an argument is out of range or the prompt is empty.
            ClosedError: If the lab was closed.
        """
        self._check_open()
        if not isinstance(max_tokens, int) or max_tokens == 0 or max_tokens < -1:
            raise ValueError(f"max_tokens must be positive, or -1 for no limit, got {max_tokens}.")
        if prefill_step_size < 1:
            raise ValueError(f"prefill_step_size must be positive, got {prefill_step_size}.")
        if kv_bits not in (None, 4, 8):
            raise ValueError(f"kv_bits must be 8, 4 or None, got {kv_bits!r}.")
        given = {
            "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p,
            "repetition_penalty": repetition_penalty, "seed": seed,
        }  # fmt: skip
        given = {key: value for key, value in given.items() if value is not None}
        sampling: Sampling = dataclasses.replace(self.sampling, **given)  # type: ignore[arg-type]
        tokens = to_tokens(self.tokenizer, prompt, template)
        # A function of its own, so that bad arguments raise here and not at the first token.
        return self._stream(
            tokens,
            sampling,
            {"template": template, "prefill_step_size": prefill_step_size, "kv_bits": kv_bits},
            max_tokens=max_tokens,
            prompt_cache=prompt_cache,
            prefill_step_size=prefill_step_size,
            **({} if kv_bits is None else {"kv_bits": kv_bits, "quantized_kv_start": 0}),
            **options,
        )

    def _stream(
        self, tokens: list[int], sampling: Sampling, settings: dict[str, Any], **options: Any
    ) -> Iterator[GenerationResponse]:
        from mlx_lm.generate import stream_generate

        for session in self.sessions:
            session.note_generation(
                {**settings, "sampling": sampling.as_dict(), "prompt_tokens": len(tokens)}
            )
        cache = options.get("prompt_cache")
        if cache is None or tokens_in(cache) == 0:  # a chat's first turn brings an empty one
            self._attachment.begin_run()
        options = {**sampling.options(), **options}
        for response in stream_generate(self.model, self.tokenizer, tokens, **options):
            yield response
            # A closed lab's model is stock again: going on would read every expert into memory.
            self._check_open()

    def generate(self, prompt: Prompt, max_tokens: int = 200, **options: Any) -> str:
        """Generates text and returns it whole. Takes the arguments of `stream`."""
        return "".join(r.text for r in self.stream(prompt, max_tokens, **options))

    def chat(self, system: str | None = None, **options: Any) -> Chat:
        """Starts a conversation that keeps its key-value cache from turn to turn.

        Args:
            system: A system message.
            **options: Settings of every turn; see `stream`.
        """
        from .chat import Chat

        self._check_open()
        return Chat(self, system=system, **options)

    def record(self, *, prompt_logprobs: bool = False) -> RecordingSession:
        """Records what the router does while the `with` block runs.

        Args:
            prompt_logprobs: Also give log-probability and entropy of prompt tokens, which costs
                the output head over every prompt token.

        Returns:
            A context manager that gives the `Recording`: `with lab.record() as rec:`.
        """
        from .routing.session import RecordingSession

        self._check_open()
        return RecordingSession(self, prompt_logprobs=prompt_logprobs)

    # -- what happens on a miss --------------------------------------------------------------

    @property
    def on_miss(self) -> str:
        """Name of what happens when a chosen expert is not resident; see `set_on_miss`."""
        return self._attachment.action.name

    @on_miss.setter
    def on_miss(self, action: str | MissAction) -> None:
        self.set_on_miss(action)

    @property
    def miss_action(self) -> MissAction:
        """The action behind `on_miss`, with its settings."""
        return self._attachment.action

    def set_on_miss(
        self, action: str | MissAction, *, swap_budget: int | Literal["keep"] | None = "keep"
    ) -> None:
        """Changes what happens on a miss, without loading the model again; resets the bank.

        Args:
            action: `"load"` (exact), `"drop"`, `"substitute"`, `"low_bit"`, `"reroute"`,
                `"wrong_slot"`, or an object of `moelab.experts.misses`.
            swap_budget: Experts a layer that may enter after a step of a lossy action; None for
                the layer's top-k. Unless given, as it was.

        Raises:
            MissActionError: If there is no such action, or this model does not allow it; the lab
                is as it was then.
            MoelabError: While the lab is being recorded.
        """
        self._check_open()
        chosen = resolve_action(action)
        budget = self.swap_budget if swap_budget == "keep" else checked_budget(swap_budget)
        if self.sessions:
            raise MoelabError(
                "The lab is being recorded, and a recording has one miss action. "
                "Leave the `with lab.record()` block first."
            )
        if isinstance(chosen, WrongSlot):
            warnings.warn(
                "on_miss='wrong_slot' computes a wrong expert at the missing one's weight. It is "
                "a baseline to compare with, not a way to run a model.",
                stacklevel=3,
            )
        self._attachment.set_action(chosen, budget)
        self.swap_budget = budget

    def resize(self, capacity: Capacity) -> None:
        """Gives the bank another capacity, without loading the model again.

        What the policy holds most worth keeping stays, pins always. Layers that come to hold all
        of their experts become stock, and the other way round.

        Args:
            capacity: As in `moelab.load`, but not `"auto"`.

        Raises:
            CapacityError: If it is no capacity of this model.
            PinsError: If it leaves too little room beside the pins.
            MoelabError: While the lab is being recorded.
        """
        self._check_open()
        if self.sessions:
            raise MoelabError(
                "The lab is being recorded, and a recording has one capacity. "
                "Leave the `with lab.record()` block first."
            )
        wanted = fixed_capacities(capacity, self.sites)
        check_room(self.pins, self.sites, wanted)
        try:
            self._attachment.resize(wanted, self._reopen)
        finally:
            self.capacities = self._attachment.capacities()
            self._watch_last_layer()
        self.budget = None  # the sum that it shows was another capacity's
        mx.clear_cache()

    # -- what there is ---------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that name the checkpoint."""
        return fingerprint(self.path, self._spans)

    @property
    def capacity(self) -> int:
        """Slots a layer; the smallest where layers differ."""
        return min(self.capacities)

    @property
    def shards(self) -> list[Path]:
        """The files that the model was loaded from, with the pack file if experts come from one."""
        banks = self._attachment.bank.layers
        experts = {path for layer in banks for path in layer.paths}
        return sorted(experts.union(span.path for span in self._spans.values()))

    @property
    def attachment(self) -> Attachment:
        """The bank and how it is attached."""
        return self._attachment

    @cached_property
    def watch(self) -> StepWatch:
        """Where one listens to the model's forward passes."""
        from .routing.steps import StepWatch

        attachment = self._attachment
        return StepWatch(self.model, self.sites, attachment.switches, attachment.bank.watchers)

    def memory(self) -> MemoryUse:
        """Returns the bytes that the weights take, by what they are for."""
        resident = sum(
            array.nbytes
            for site in self.sites
            if site.layer not in self._attachment.switches
            for _, _, array in site.tensors()
        )
        slots = self._attachment.bank.nbytes
        low = self._attachment.low_bit_bytes
        total = sum(a.nbytes for a in arrays_in(all_parameters(self.model)))
        return MemoryUse(total - slots - resident - low, slots, resident, low)

    def reset(self) -> None:
        """Brings the bank back to its initial contents, as it was after loading."""
        self._check_open()
        self._attachment.reset()

    def close(self) -> None:
        """Takes the bank out and closes the files. Calling it again does nothing."""
        if not self._closed:
            self._closed = True
            self._attachment.detach()
            mx.clear_cache()

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _watch_last_layer(self) -> None:
        # What a prompt's chunk computes in the last layer goes nowhere but to unread logits.
        last = self._attachment.switches.get(len(getattr(self.model, "layers", ())) - 1)
        if last is not None:
            object.__setattr__(last, "unread", output_unread)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"This lab ({self.name}) was closed. Load the model again.")

    def _facts(self) -> dict[str, str]:
        site = self.sites[0]
        memory = self.memory()
        on_disk = sum(span.nbytes for span in self._spans.values())
        slots = sorted(set(self.capacities))
        pinned = sum(len(pins) for pins in self.pins.values())
        capacity = str(slots[0]) if len(slots) == 1 else f"{slots[0]}–{slots[-1]}"
        return {
            "model": f"{self.name} ({self.config['model_type']})",
            "layers": f"{len(self.sites)} MoE layers",
            "experts": f"{site.experts} a layer, top-{site.top_k}",
            "capacity": f"{capacity} of {site.experts} experts a layer"
            + (" (all resident)" if not self._attachment.switches else ""),
            "on a miss": self.on_miss + ("" if self.miss_action.lossy else " (exact)"),
            "policy": self.policy + (f", {pinned} pinned" if pinned else ""),
            "in memory": f"{size(memory.total)} (trunk {size(memory.trunk)}, "
            f"experts {size(memory.slots + memory.resident_experts)})",
            "on disk": size(on_disk),
        }

    def __repr__(self) -> str:
        return f"<Lab {self.name}: closed>" if self._closed else facts_text("Lab", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("Lab", {"model": "closed"} if self._closed else self._facts())
