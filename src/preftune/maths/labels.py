"""How sure a label is: from the confidence of a pair to the probability that its label is the wrong way round."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.maths.types import PairLogps


def flip_probability(logps: PairLogps, label_smoothing: float = 0.0) -> Float[Tensor, " pairs"]:
    """e, the probability that each label is wrong: 1 - c where a pair says a confidence c below 1, else ``label_smoothing``.

    A loss L(y_w, y_l) that takes confidences becomes its expectation over the label, (1 - e) L(y_w, y_l) + e L(y_l, y_w),
    unless its docstring says how its own paper uses a probability.

    >>> z, n = torch.zeros(2), torch.ones(2, dtype=torch.int)
    >>> flip_probability(PairLogps(z, z, z, z, n, n, confidence=torch.tensor([0.75, 1.0])), 0.1)
    tensor([0.2500, 0.1000])
    """
    if logps.confidence is None:
        return torch.full_like(logps.policy_chosen, label_smoothing)
    return torch.where(logps.confidence < 1, 1 - logps.confidence, label_smoothing)
