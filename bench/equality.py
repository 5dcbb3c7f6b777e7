"""Is the fast path right? The code path that is timed against transformers' and PEFT's own forward, one row a completion.

In float32: log-probs of completion tokens within 1e-4 nat, gradients of the adapters within 1e-4 relative. In bfloat16:
mean and maximum error against float32 at most 1.1 times those of the plain bfloat16 forward. Also the machine's ceiling: the
best of a sweep of matrix products. Writes one JSON object; exit status 1 where the check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from preftune.core.recipe import LoraConfig, ModelConfig
from preftune.core.records import TokenisedExample
from preftune.data.pack import Pack, pack_step
from preftune.modeling.adapters import add_lora
from preftune.modeling.compile import choose_kernels
from preftune.modeling.forward import Scorer
from preftune.modeling.load import load_model
from preftune.training.devices import set_allocator
from rows import rows_of

NATS, RELATIVE, FACTOR = 1e-4, 1e-4, 1.1
RANK = 16


def plain_model(folder: str, dtype: torch.dtype) -> Any:
    """transformers' model with PEFT's adapters, nothing of preftune."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, settings).eval()


def plain_logps(model: Any, examples: Sequence[TokenisedExample]) -> Tensor:
    """log p of every completion token, example by example, chosen before rejected."""
    parts = []
    for example in examples:
        for completion in example.completions:
            ids = torch.tensor([[*example.prompt_ids, *completion.ids]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(example.prompt_ids) - 1 : -1]
            parts.append(torch.log_softmax(logits.float(), -1).gather(1, ids[0, len(example.prompt_ids) :, None]).squeeze(1))
    return torch.cat(parts)


def shake(model: Any, seed: int = 1) -> None:
    """Adapters as after some training (about 2 % of each layer's output), so that every gradient and product counts."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=made) * (0.02 if "lora_A" in name else 0.002))


def scored(model: Any, packs: Sequence[Pack], logps_of: Callable[[Pack], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of all packs, in training mode and with their graph; gradients of a fixed weighted sum of them."""
    model.train()
    weights = torch.Generator().manual_seed(2)
    found = []
    for pack in packs:
        logps = logps_of(pack)
        (logps * torch.randn(len(logps), generator=weights)).sum().backward()
        found.append(logps.detach())
    return torch.cat(found), {name: one.grad for name, one in model.named_parameters() if one.requires_grad}


def say(why: str) -> None:
    """What runs uncompiled, and why."""
    print(why, file=sys.stderr)


def check(folder: str, rows: str, num_pairs: int) -> dict[str, Any]:
    """The gaps, and whether they are within the limits."""
    logps: dict[str, Tensor] = {}
    grads: dict[str, dict[str, Tensor]] = {}
    for precision in ("float32", "bfloat16"):
        loaded = load_model(ModelConfig(name=folder), precision=precision)  # type: ignore[arg-type]
        examples = rows_of(rows, loaded.tokenizer, 1024)[:num_pairs]
        packs = pack_step(examples, 2048)
        model = add_lora(loaded.model, LoraConfig(rank=RANK, alpha=2 * RANK), seed=0)
        shake(model)
        scorer = Scorer(model, shared="auto", kernels=choose_kernels("on", torch.device("cpu"), loaded.model.dtype, 1, say))
        kernel = scorer.kernel
        if not scorer.is_shared:
            raise SystemExit(f"the timed path does not share prefixes: {scorer.reason}")
        logps[f"ours {precision}"], grads[f"ours {precision}"] = scored(model, packs, scorer.token_logps)
        del loaded, model, scorer
        plain = plain_model(folder, getattr(torch, precision))
        shake(plain)
        made = scored(plain, packs, lambda pack, plain=plain: plain_logps(plain, pack.examples))  # type: ignore[misc]
        logps[f"plain {precision}"], grads[f"plain {precision}"] = made
        del plain
    assert sorted(grads["ours float32"]) == sorted(grads["plain float32"])
    exact = logps["plain float32"]
    gap = float((logps["ours float32"] - exact).abs().max())
    relative = max(
        float((grads["ours float32"][name] - grad).norm() / grad.norm().clamp_min(1e-12))
        for name, grad in grads["plain float32"].items()
    )
    errors = {key: (logps[f"{key} bfloat16"] - exact).abs() for key in ("ours", "plain")}
    mean, most = ({key: float(of(error)) for key, error in errors.items()} for of in (torch.mean, torch.amax))
    return {
        "kernel": kernel,
        "pairs": num_pairs,
        "tokens": len(exact),
        "float32_largest_gap_nats": gap,
        "float32_gradient_gap_relative": relative,
        "bfloat16_error_mean": mean,
        "bfloat16_error_max": most,
        "checks": {
            "float32 log-probs within 1e-4 nat": gap <= NATS,
            "float32 gradients within 1e-4 relative": relative <= RELATIVE,
            "bfloat16 mean error at most 1.1 times plain": mean["ours"] <= FACTOR * mean["plain"],
            "bfloat16 maximum error at most 1.1 times plain": most["ours"] <= FACTOR * most["plain"],
        },
    }


def ceiling() -> dict[str, float]:
    """Best rate of bfloat16 and float32 matrix products over a few sizes, GFLOP/s."""
    best: dict[str, float] = {}
    for name in ("bfloat16", "float32"):
        for rows, inner, columns in ((2048, 576, 1536), (2048, 1536, 576), (1024, 576, 8192), (2048, 2048, 2048)):
            first, second = (torch.randn(*shape).to(getattr(torch, name)) for shape in ((rows, inner), (inner, columns)))
            times = []
            for _ in range(12):
                start = time.perf_counter()
                torch.mm(first, second)
                times.append(time.perf_counter() - start)
            best[name] = max(best.get(name, 0.0), 2 * rows * inner * columns / min(times) / 1e9)
    return best


if __name__ == "__main__":
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--model", required=True)
    made.add_argument("--train", required=True)
    made.add_argument("--out", required=True)
    made.add_argument("--pairs", type=int, default=16)
    made.add_argument("--ceiling-only", action="store_true")
    options = made.parse_args()
    set_allocator()
    checked = {} if options.ceiling_only else check(options.model, options.train, options.pairs)
    result = checked | {"ceiling_gflops": ceiling()}
    Path(options.out).write_text(json.dumps(result))
    sys.exit(0)
