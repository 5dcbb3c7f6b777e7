"""Which models can share a prefix, and the certificate that one does.

Rules first (a model class can accept the name of an attention function and never call it, or mix in layers that carry
state from token to token), then a probe: the attention function was called once per layer, windows arrived where the
configuration has them, and packed log-probs equal those of plain rows.
"""

from __future__ import annotations

import inspect
import random
from typing import Any

from transformers import PreTrainedModel

from preftune.core.records import TokenisedCompletion, TokenisedExample
from preftune.data.pack import Pack, pack_of
from preftune.modeling.layout import Call

SHAREABLE_LAYERS = frozenset({"full_attention", "sliding_attention"})
ROPE_BY_LENGTH = frozenset({"dynamic", "longrope"})
LONGEST_PROBE = 512  # tokens; a wider window is certified by its keyword alone


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the language model itself."""
    return model.config.get_text_config()


def why_not_shared(model: PreTrainedModel) -> list[str]:
    """Reasons, from class and configuration alone, why this model cannot share a prefix; empty where it may."""
    config = text_config(model)
    reasons = []
    if config.is_encoder_decoder:
        reasons.append("it is an encoder-decoder")
    if not getattr(type(model), "_supports_attention_backend", False):
        reasons.append(f"{type(model).__name__} does not call the attention interface")
    others = sorted(set(getattr(config, "layer_types", None) or ()) - SHAREABLE_LAYERS)
    if others:
        reasons.append(f"it has layers of type {', '.join(others)}")
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    kinds = sorted({str(part.get("rope_type")) for part in parts} & ROPE_BY_LENGTH)
    if kinds:
        reasons.append(f"its rotary positions ({', '.join(kinds)}) depend on the longest row of the batch")
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "absolute") not in (
        "absolute",
        "rope",
        None,
    ):
        reasons.append("its position bias is not known to the shared attention")
    if not _takes_keywords(model):
        reasons.append(f"{type(model).__name__} takes no further keyword arguments")
    return reasons


def num_attention_layers(model: PreTrainedModel) -> int:
    """How often the attention function must be called in one forward pass."""
    return int(text_config(model).num_hidden_layers)


def num_windowed_layers(model: PreTrainedModel) -> int:
    """How many layers look through a window, by the configuration."""
    config = text_config(model)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return sum(kind == "sliding_attention" for kind in kinds)
    has_window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return num_attention_layers(model) if has_window else 0


def trace_fault(model: PreTrainedModel, trace: list[Call]) -> str | None:
    """What is wrong with the attention calls of one forward pass, or None."""
    expected = num_attention_layers(model)
    if len(trace) != expected:
        return f"its attention function was called {len(trace)} times for {expected} layers"
    windowed = sum(call.window is not None for call in trace)
    if windowed < num_windowed_layers(model):
        return f"its window reached the attention function in {windowed} of {num_windowed_layers(model)} layers"
    return None


def probe_pack(model: PreTrainedModel) -> Pack:
    """Two groups of random tokens, longer than the window where that is affordable. Uses no torch randomness."""
    config = text_config(model)
    window = getattr(config, "sliding_window", None)
    span = 12 if not isinstance(window, int) or window + 8 > LONGEST_PROBE else window + 4
    positions = next((int(n) for n in position_limits(config)), 1 << 30)
    span = max(1, min(span, positions - 8))
    draw = random.Random(0)
    vocabulary = int(config.vocab_size)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(min(3, vocabulary - 1), vocabulary) for _ in range(count))

    def example(prompt: int, lengths: tuple[int, ...]) -> TokenisedExample:
        completions = tuple(TokenisedCompletion(ids(length), (True,) * length) for length in lengths)
        return TokenisedExample("probe", ids(prompt), completions)

    return pack_of([example(span, (5, 4)), example(3, (2, 6))])


def position_limits(config: Any) -> list[int]:
    """Numbers of positions that the configuration names, the model's own first; empty where it has no limit."""
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
    return [int(value) for value in (getattr(config, name, None) for name in names) if isinstance(value, int) and value > 0]


def _takes_keywords(model: PreTrainedModel) -> bool:
    parameters = inspect.signature(model.base_model.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
