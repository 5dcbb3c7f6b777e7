"""The only way from a pack to log-probabilities, for policy and reference alike.

Where the model allows it (:mod:`preftune.modeling.sharing`) a pack runs as one row in which every prompt stands once.
Everywhere else each completion runs as a row of its own, without padding, through the model's own attention. Both give
the same numbers in the same order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar, cast

import numpy.typing as npt
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from preftune.data.pack import Pack
from preftune.maths.types import SequenceLogps
from preftune.modeling.attention import (
    SHARED,
    CannotShare,
    attention_name,
    plain_attention,
    plain_name,
    use_attention,
)
from preftune.modeling.block import Trial, drop_block, has_block, lay_out_block, use_blocks
from preftune.modeling.head import HeadSpec, head_spec, token_concentration, token_logps
from preftune.modeling.kernels import EAGER, Kernels
from preftune.modeling.laid_out import LaidOut, can_be_laid_out, lay_out
from preftune.modeling.layout import Call, PairLayout
from preftune.modeling.routers import Routers
from preftune.modeling.sharing import probe_pack, trace_fault, why_not_shared

T = TypeVar("T")

# nats on the probe, (mean, maximum): rounding reaches these at most, a wrong mask or head exceeds them
TOLERANCE = {torch.float64: (1e-4, 1e-3), torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.1, 0.5), torch.float16: (0.05, 0.25)}


class Entry(nn.Module):
    """The root of a model's modules: whatever reaches its weights runs inside one forward of this module.

    Sharded weights (FSDP2) are whole only inside the forward passes of their modules, and those of embedding, norm and head
    belong to the root. So scoring and sampling are handed to this module as a function.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], T]) -> T:
        """Do the work, and return what it returns."""
        return work()


class Scorer:
    """Per-token log-probabilities of completions under a causal language model.

    Built once per model: a probe of about forty tokens compares the packed path and the fused head with plain rows
    and the model's own logits, and takes the slower path where they differ. Weights may change afterwards, adapters
    may be switched, the model may be moved.

    Parameters
        model: a causal LM, with or without adapters.
        shared: ``auto`` shares prefixes where possible, True insists on it, False never does.
        head_chunk: tokens whose logits exist at one time; None chooses by the size of the vocabulary.
        entry: the module that the model is reached through, where it is spread over processes; else one of its own.
        dtype: that the model computes in, where its weights are kept in another one.
        blocks: run layers of the Llama kind as fused blocks where they share prefixes (:mod:`preftune.modeling.block`).
        kernels: the elementwise arithmetic of fused blocks and of the head.

    Attributes
        peers: where weights are sharded, the packs that all processes run at the same time: without sharing each takes
            as many forward passes as the longest, because the processes gather every layer's weights together.
        is_shared: whether prefixes are shared. reason: why not, in one sentence ("" where they are).
        kernel: a name for the arithmetic, part of the reference's identity.

    Raises
        CannotShare: ``shared=True`` and the model cannot.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        shared: bool | Literal["auto"] = "auto",
        head_chunk: int | None = None,
        entry: nn.Module | None = None,
        dtype: torch.dtype | None = None,
        blocks: bool = True,
        kernels: Kernels = EAGER,
    ) -> None:
        self.model = model
        self.kernels = kernels
        self._wants_blocks = blocks and entry is None  # sharded weights are not such that blocks can read them
        self.entry = Entry(model) if entry is None else entry
        self._base = base_of(model)
        self.peers: Sequence[Pack] = ()  # the packs that other processes run meanwhile
        self._dtype = dtype
        self._spec: HeadSpec | None = replace(head_spec(self._base, head_chunk), softmax=kernels.token_softmax)
        self._concentrations: list[Tensor] | None = None  # where the head puts them while they are asked for
        self._laid: Mapping[nn.Module, tuple[LaidOut | None, ...]] = {}  # frozen weights of blocks, laid out for products
        self.routers: Routers | None = None  # whose auxiliary loss is part of the objective, with this weight
        self.router_weight = 0.0
        self.is_shared = False
        self.reason = "switched off" if shared is False else ""
        self._prepare(is_wanted=shared is not False)
        if shared is True and not self.is_shared:
            raise CannotShare(f"{type(self._base).__name__} cannot share prefixes: {self.reason}")

    @property
    def kernel(self) -> str:
        """Layout, attention and head in words: ``shared/preftune_shared/fused`` or ``rows/sdpa/logits``."""
        layout = f"shared/{SHARED}{self._blocks}" if self.is_shared else f"rows/{plain_name(self._base)}"
        return f"{layout}/{'logits' if self._spec is None else 'fused'}"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        return self._base.dtype if self._dtype is None else self._dtype

    @property
    def num_blocks(self) -> int:
        """Layers that run as fused blocks."""
        return sum(has_block(layer) for layer in decoder_layers(self._base)) if self.is_shared else 0

    @property
    def _blocks(self) -> str:
        return f"+{self.num_blocks}blocks/{self.kernels.name}" if self.num_blocks else ""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self._base.parameters()).device

    def token_logps(self, pack: Pack, *, with_prompts: bool = False) -> Tensor:
        """log p of every scored token, in the order of ``pack.targets``: (targets,) nats, float32, with graph if enabled.

        with_prompts: behind them those of each group's prompt in the order of its tokens, from the second one on.
        """
        if len(pack.targets) == 0 and not self.peers:
            return torch.zeros(0, device=self.device)
        if self.routers is None:
            return cast(Tensor, self.entry(lambda: self._token_logps(pack, with_prompts=with_prompts)))
        with self.routers.listening():
            logps = cast(Tensor, self.entry(lambda: self._token_logps(pack, with_prompts=with_prompts)))
            return self.routers.attached(logps)

    @property
    def bytes_to_lay_out(self) -> int:
        """What ``lay_out_weights`` would take; 0 where there is nothing to lay out, and where other bits would come of it."""
        layers = self._block_layers() if self.dtype == torch.bfloat16 else []
        modules = [*layers, output_head(self._base)] if layers else []
        return 2 * sum(one.nbytes for module in modules for one in module.parameters() if can_be_laid_out(one))

    def lay_out_weights(self) -> None:
        """Lay frozen weights out for the products of a CPU (:mod:`preftune.modeling.laid_out`): a tenth faster, for two copies.

        A weight that is changed in place afterwards is multiplied as it stands, unless it is changed through ``.data``.
        """
        layers, head = self._block_layers(), output_head(self._base)
        self._laid = {layer: lay_out_block(layer) for layer in layers}
        if layers and self._spec is not None and type(head) is nn.Linear:
            self._spec = replace(self._spec, laid=lay_out([head]))

    def _block_layers(self) -> list[nn.Module]:
        return [layer for layer in decoder_layers(self._base) if has_block(layer)] if self.is_shared else []

    def plain(self) -> Scorer:
        """The same model scored by one row for each completion."""
        other = copy.copy(self)
        other.is_shared = False
        return other

    def _token_logps(self, pack: Pack, *, with_prompts: bool) -> Tensor:
        if self.is_shared:
            if attention_name(self._base) != SHARED:  # somebody else switched it
                use_attention(self._base, SHARED)
            return self._shared_row(pack, None, with_prompts=with_prompts)
        with plain_attention(self._base):
            return self._rows(pack, with_prompts=with_prompts)

    def token_logps_and_concentration(self, pack: Pack, *, with_prompts: bool = False) -> tuple[Tensor, Tensor]:
        """``token_logps``, and log sum over the vocabulary of p(v)^2 at each of the same places, without a graph."""
        self._concentrations = []
        try:
            logps = self.token_logps(pack, with_prompts=with_prompts)
            parts = self._concentrations
        finally:
            self._concentrations = None
        return logps, torch.cat(parts) if parts else torch.zeros_like(logps)

    def sequence_logps(self, pack: Pack) -> SequenceLogps:
        """Log-probability of each completion, summed over its scored tokens in float32, and their number."""
        logps = self.token_logps(pack)
        sums = torch.zeros(pack.num_completions, dtype=logps.dtype, device=logps.device)
        sums = sums.index_add(0, self._tensor(pack.segments), logps)
        return SequenceLogps(sums, self._tensor(pack.num_tokens))

    def _shared_row(
        self, pack: Pack, trace: list[Call] | None, *, with_prompts: bool = False, trial: Trial | None = None
    ) -> Tensor:
        rows, targets = self._tensor(pack.rows), self._tensor(pack.targets)
        if with_prompts:
            places = [place for group in pack.groups for place in range(group.start, group.start + group.prompt - 1)]
            more = torch.tensor(places, dtype=rows.dtype, device=rows.device)
            rows, targets = torch.cat([rows, more]), torch.cat([targets, self._tensor(pack.ids).index_select(0, more + 1)])
        asked_rows = None if self._spec is None else rows
        layout = PairLayout(pack.groups, trace, kernels=self.kernels, rows=asked_rows, trial=trial, laid=self._laid)
        extras = {"position_ids": self._tensor(pack.positions)[None], "pair_layout": layout}
        return self._score(self._tensor(pack.ids)[None], rows, targets, extras)

    def _rows(self, pack: Pack, *, with_prompts: bool = False) -> Tensor:
        """One row a completion; hidden states are gathered so that the head runs once. Prompts have rows of their own."""
        parts = []
        at = 0
        for example in pack.examples:
            for completion in example.completions:
                count = completion.num_scored
                if count:
                    ids = torch.tensor([[*example.prompt_ids, *completion.ids]], device=self.device)
                    first = len(example.prompt_ids) - 1
                    rows = torch.tensor([first + i for i, scored in enumerate(completion.scored) if scored], device=self.device)
                    targets = self._tensor(pack.targets[at : at + count])
                    parts.append(self._score(ids, rows, targets, {}))
                at += count
        for example in pack.examples if with_prompts else ():
            if len(example.prompt_ids) > 1:
                ids = torch.tensor([example.prompt_ids], device=self.device)
                parts.append(self._score(ids, torch.arange(ids.shape[1] - 1, device=self.device), ids[0, 1:], {}))
        most = max((_num_rows(peer, with_prompts=with_prompts) for peer in self.peers), default=0)
        for _ in range(len(parts), most):
            ids = torch.zeros((1, 2), dtype=torch.int64, device=self.device)
            parts.append(self._score(ids, ids[0, :1], ids[0, :1], {})[:0])  # nothing but its part in the gathering
        return torch.cat(parts)

    def _score(self, ids: Tensor, rows: Tensor, targets: Tensor, extras: dict[str, Any]) -> Tensor:
        base = self._base
        if self._spec is None:
            logits = base(input_ids=ids, use_cache=False, **extras).logits[0]
            picked = logits.index_select(0, rows)
            picked = picked if picked.dtype == torch.float64 else picked.float()
            every = torch.log_softmax(picked, -1)
            if self._concentrations is not None:
                self._concentrations.append(torch.logsumexp(2 * every.detach(), -1))
            return every.gather(1, targets[:, None]).squeeze(1)
        hidden = base.base_model(input_ids=ids, use_cache=False, **extras).last_hidden_state[0]
        layout = extras.get("pair_layout")
        is_picked = layout is not None and bool(layout.taken)  # by the last layer, which left the other rows out
        # index_select, because the backward of h[rows] adds in any order where a row is used twice
        picked, head = hidden if is_picked else hidden.index_select(0, rows), output_head(base)
        if self._concentrations is not None:
            self._concentrations.append(token_concentration(picked, head, self._spec))
        return token_logps(picked, head, targets, self._spec)

    def _prepare(self, *, is_wanted: bool) -> None:
        """Compare head and layout with the model's own logits on plain rows; keep what agrees."""
        base = self._base
        was_training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        pack = probe_pack(base)
        try:
            with torch.no_grad(), plain_attention(base):
                fused, self._spec = self._spec, None
                expected = self.entry(lambda: self._rows(pack))
                if _has_plain_layout(base):
                    self._spec = fused
                    if not self._agrees(self.entry(lambda: self._rows(pack)), expected):
                        self._spec = None
            if is_wanted:
                self.reason = self._try_sharing(pack, expected)
                self.is_shared = not self.reason
        finally:
            for module in was_training:
                module.training = True

    def _try_sharing(self, pack: Pack, expected: Tensor) -> str:
        """The empty string where packed rows agree with plain ones, else what went wrong."""
        base = self._base
        reasons = why_not_shared(base)
        if reasons:
            return "; ".join(reasons)
        before = attention_name(base)
        trace: list[Call] = []
        try:
            use_attention(base, SHARED)
            with torch.no_grad():
                got = self.entry(lambda: self._shared_row(pack, trace))
            fault = trace_fault(base, trace)
            if fault is None and not self._agrees(got, expected):
                fault = f"packed log-probs differ from plain ones by {(got - expected).abs().max():.2g} nats on a probe"
            if fault is None and self._wants_blocks:
                self._try_blocks(pack, expected)
        except CannotShare as error:
            fault = str(error)
        if fault is not None:
            base.set_attn_implementation(before)
        return fault or ""

    def _try_blocks(self, pack: Pack, expected: Tensor) -> None:
        """Fused blocks for the layers that pass their trial, if the log-probs of the probe stay what they are."""
        layers = decoder_layers(self._base)
        if not use_blocks(layers):
            return
        with torch.no_grad():
            self.entry(lambda: self._shared_row(pack, None, trial=Trial()))
            is_right = self._agrees(self.entry(lambda: self._shared_row(pack, None)), expected)
        if not is_right:
            for layer in layers:
                drop_block(layer)

    def _agrees(self, got: Tensor, expected: Tensor) -> bool:
        mean, most = TOLERANCE[self.dtype]
        gap = (got - expected).abs()
        return bool(gap.mean() <= mean and gap.max() <= most)

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        # the host need not wait: what reads it on the device comes after it in the same queue
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def _num_rows(pack: Pack, *, with_prompts: bool) -> int:
    """Forward passes of a pack whose prompts are not shared."""
    completions = sum(one.num_scored > 0 for example in pack.examples for one in example.completions)
    return completions + sum(len(example.prompt_ids) > 1 for example in pack.examples if with_prompts)


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, adapters or not."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def decoder_layers(base: PreTrainedModel) -> list[nn.Module]:
    """The layers of the model's body in their order; none where it keeps them elsewhere than in ``layers``."""
    layers = getattr(base.base_model, "layers", None)
    return list(layers) if isinstance(layers, nn.ModuleList) else []


def output_head(base: PreTrainedModel) -> nn.Module:
    """The module that turns hidden states into logits."""
    return cast(nn.Module, base.get_output_embeddings())  # type: ignore[no-untyped-call]  # transformers leaves it untyped


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only layer inputs for backward and compute the rest again: less memory, about a third more time."""
    base, options = base_of(model), {"use_reentrant": False}
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # transformers before 5.20
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[no-untyped-call]  # transformers leaves it untyped


def _has_plain_layout(base: PreTrainedModel) -> bool:
    """Whether the model is a body that returns hidden states and a head that is one module."""
    return base.base_model is not base and base.get_output_embeddings() is not None  # type: ignore[no-untyped-call]  # transformers leaves it untyped
