"""Weights of desirable and undesirable completions, and how they follow from the numbers of both."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from annotated_types import Gt

Weight: TypeAlias = Annotated[float, Gt(0)] | Literal["auto"]
LOW, HIGH = 1.0, 4 / 3  # of lambda_d n_d / (lambda_u n_u), section 4.2 of the KTO paper (arXiv:2402.01306)


def fitted_weights(d: float | Literal["auto"], u: float | Literal["auto"], counts: tuple[int, int]) -> tuple[float, float]:
    """Both weights as numbers: one that is ``auto`` follows from the other until lambda_d n_d = lambda_u n_u.

    Where both are, the rarer label is weighted up and the other keeps 1. Where one label has no completion, nothing can be
    balanced and ``auto`` is 1.

    Parameters
        d, u: lambda_d and lambda_u. counts: n_d and n_u, completions of each label in the data.

    >>> fitted_weights("auto", "auto", (50, 200))
    (4.0, 1.0)
    >>> fitted_weights(1.5, "auto", (100, 50))
    (1.5, 3.0)
    """
    if not all(counts):
        return 1.0 if d == "auto" else d, 1.0 if u == "auto" else u
    ratio = counts[0] / counts[1]
    if d == "auto":
        return (max(1.0, 1 / ratio), max(1.0, ratio)) if u == "auto" else (u / ratio, u)
    return d, d * ratio if u == "auto" else u


def doubt_weights(d: float | Literal["auto"], u: float | Literal["auto"], counts: tuple[int, int]) -> str:
    """What is unusual about such weights on data with these counts, in a sentence; empty where nothing is.

    >>> doubt_weights(1.0, 1.0, (5, 0))
    'no completion is undesirable, so the loss only moves all of them one way'
    """
    num_desirable, num_undesirable = counts
    if not all(counts):
        which = "undesirable" if num_desirable else "desirable"
        return f"no completion is {which}, so the loss only moves all of them one way"
    if d == "auto" or u == "auto":
        return ""
    ratio = d * num_desirable / (u * num_undesirable)
    if LOW - 1e-9 <= ratio <= HIGH + 1e-9:
        return ""
    return (
        f"lambda_d x {num_desirable} desirable over lambda_u x {num_undesirable} undesirable completions is {ratio:.3g}, "
        "outside the 1 to 4/3 of the paper"
    )
