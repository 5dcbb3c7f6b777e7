"""A loss that was passed from Python instead of named in a recipe: is it one, and does it belong to the method it replaces?"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch

from preftune.core.errors import UsageError
from preftune.core.ids import digest_json
from preftune.maths.losses.base import BaseLoss, Loss, losses
from preftune.maths.types import LossTerms, PairLogps, SequenceLogps, TokenLogps, UnpairedLogps


@dataclass(frozen=True, slots=True)
class FunctionLoss(BaseLoss):
    """A plain function of ``PairLogps`` as a loss over pairs that needs a reference."""

    function: Callable[[PairLogps], LossTerms]

    def __call__(self, logps: PairLogps) -> LossTerms:
        """What the function gives."""
        return self.function(logps)


def passed_loss(given: object, method: str) -> Loss:
    """The loss that stands in for the formula of ``method``, whose data, defaults and view it takes.

    Parameters
        given: an object with the loss contract (``preftune.maths.losses.base``), or a function of ``PairLogps``.

    Raises
        UsageError: it is neither, it takes another view than the method, or on a trial pair it returns something else than
            finite ``LossTerms`` with a gradient and rewards.
    """
    is_class = inspect.isclass(given)
    if not is_class and isinstance(given, Loss):
        loss: Loss = given
    elif not is_class and callable(given):
        loss = FunctionLoss(given)
    else:
        raise UsageError(f"loss: {given!r} is no loss: pass an instance of a loss class, or a function of PairLogps")
    built = losses.factory(method)
    if loss.view != built.view:
        raise UsageError(
            f"loss: {name_of(loss)} takes {loss.view}, and method {method!r} reads {built.view}; name a method like it"
        )
    _try(loss)
    return loss


def name_of(loss: Loss) -> str:
    """The name of the class, or of the function."""
    return getattr(loss.function, "__name__", "a function") if isinstance(loss, FunctionLoss) else type(loss).__name__


def identity_of(loss: Loss) -> str:
    """Digest of name, settings and source: a stage that was trained with another loss is not resumed."""
    subject: Any = loss.function if isinstance(loss, FunctionLoss) else type(loss)
    try:
        source = inspect.getsource(subject)
    except (OSError, TypeError):
        source = ""
    settings = "" if isinstance(loss, FunctionLoss) else _settings_of(loss)
    return digest_json([name_of(loss), settings, source])


def _settings_of(loss: object) -> str:
    """The fields of a dataclass; of any other object nothing that is the same in the next process."""
    return repr(loss) if is_dataclass(loss) else ""


def _try(loss: Loss) -> None:
    """Call the loss on three made-up items and look at what comes back."""
    view, policy = _trial(loss)
    try:
        terms: object = loss(view)
    except Exception as error:
        raise UsageError(f"loss: {name_of(loss)} fails on a trial of {loss.view}: {type(error).__name__}: {error}") from error
    if not isinstance(terms, LossTerms) or not terms.terms:
        raise UsageError(f"loss: {name_of(loss)} returns {type(terms).__name__}; return LossTerms with at least one Term")
    values = torch.cat([term.values.reshape(-1) for term in terms.terms.values()])
    if not bool(torch.isfinite(values).all()):
        raise UsageError(f"loss: {name_of(loss)} gives {values.tolist()} on a trial of {loss.view}; it must be finite")
    if not values.requires_grad:
        raise UsageError(
            f"loss: {name_of(loss)} has no gradient by the policy's log-probabilities; do not detach or convert them"
        )
    gradient = torch.autograd.grad(values.sum(), policy, allow_unused=True)
    if not all(one is None or bool(torch.isfinite(one).all()) for one in gradient):
        raise UsageError(f"loss: {name_of(loss)} has a gradient that is not finite on a trial of {loss.view}")
    if loss.view != "demonstrations" and (terms.chosen_rewards is None or terms.rejected_rewards is None):
        raise UsageError(
            f"loss: {name_of(loss)} gives no rewards; set chosen_rewards and rejected_rewards, the metrics need them"
        )


def _trial(loss: Loss) -> tuple[Any, list[torch.Tensor]]:
    counts = torch.tensor([5, 7, 4])
    own = [torch.tensor([-8.0, -11.0, -6.5]).requires_grad_(), torch.tensor([-9.0, -10.0, -7.5]).requires_grad_()]
    frozen = torch.tensor([-8.5, -10.5, -7.0])
    if loss.view == "demonstrations":
        return SequenceLogps(own[0], counts), own
    if loss.view == "unpaired":
        labels = torch.tensor([True, False, True])
        return UnpairedLogps(own[0], frozen, counts, labels, frozen + 0.1, frozen), own
    ones = torch.ones(3)
    tokens = [
        TokenLogps(side.repeat(2) / 2, frozen.repeat(2) / 2, torch.arange(3).repeat(2).sort().values, torch.arange(2).repeat(3),
                   -ones.repeat(2))
        for side in own
    ]  # fmt: skip
    ties = torch.zeros(3, dtype=torch.bool) if "ties" in loss.needs else None
    return PairLogps(own[0], own[1], frozen, frozen, counts, counts, ones, ones, ties, tokens[0], tokens[1]), own
