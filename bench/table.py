"""The page of results: `bench/results/README.md`, from the JSON files beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Found = dict[str, Any]


def row(*cells: object) -> str:
    """One line of a table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def head(*cells: str) -> list[str]:
    """The first two lines of a table."""
    return [row(*cells), "|" + "---|" * len(cells)]


def gb(size: float) -> str:
    """Gigabytes, one decimal."""
    return f"{size / 1e9:.1f}"


def parity_lines(found: Found) -> list[str]:
    lines = [
        "## Parity: is it the same training?",
        "",
        "tinystories-656k, full fine-tuning in float32, 8 pairs a step, rasbt-preference; the same rows, order and settings.",
        "",
        *head("", ""),
        row("steps compared", found["steps"]),
        row("rows whose token ids differ", f"{found['rows_with_other_ids']} of {found['rows']}"),
        row("largest gap of a step's loss", f"{found['largest_gap']:.1e} (at most {found['tolerance']:g})"),
        row("loss at the first and the last step", f"{found['first_losses'][1]:.6f}, {found['last_losses'][1]:.6f}"),
    ]
    if not found.get("by_loss"):
        return lines
    lines += ["", *head("loss", "steps", "rows with other ids", "largest gap of a step's loss", "compared")]
    return lines + [
        row(f"`{name}`", one["steps"], one["rows_with_other_ids"], f"{one['largest_gap']:.1e}", one["note"])
        for name, one in found["by_loss"].items()
    ]


def quality_lines(found: Found) -> list[str]:
    accuracy, training, process = found["accuracy"], found["train_seconds"], found["process_seconds"]
    left_out = ", ".join(f"{count} {reason}" for reason, count in found["left_out"].items())
    each = {
        system: ", ".join(f"{one[system]['accuracy']:.2f}" for one in found["rounds"]) for system in ("trl", "preftune")
    }  # fmt: skip
    return [
        "## Quality and time of a whole training",
        "",
        f"The same model and data, one epoch of {found['pairs']} pairs, {len(found['rounds'])} seeds (orders), alternating;",
        f"times are medians. Left out for both systems, of 1,100 rows: {left_out}.",
        f"Held out: {found['held_out']} pairs; accuracy of the saved model by a plain forward pass that",
        "belongs to neither system.",
        "",
        *head("", "TRL 1.16", "preftune", "share"),
        row("held-out accuracy, mean", f"{accuracy['trl']:.3f}", f"{accuracy['preftune']:.3f}", ""),
        row("of each seed", each["trl"], each["preftune"], ""),
        row(
            "training with the reference, s",
            f"{training['trl']:.1f}",
            f"{training['preftune']:.1f}",
            f"{found['time_ratio']:.2f}",
        ),
        row(
            "the whole process, imports included, s",
            f"{process['trl']:.1f}",
            f"{process['preftune']:.1f}",
            f"{found['process_time_ratio']:.2f}",
        ),
    ]


def lora_lines(found: Found) -> list[str]:
    ours, method, is_lora = found["preftune"], found.get("method", "dpo"), found.get("is_lora", True)
    trained = "LoRA of rank 16 on all linear layers" if is_lora else "all weights trained"
    lines = [
        f"## Speed and memory of {'LoRA' if is_lora else 'full'} {method.upper()}",
        "",
        f"SmolLM2-135M's shape with random weights, {trained}, 8 pairs a step with the lengths of",
        "hh-rlhf helpful-base. Medians over alternating rounds; the ratio in a row is taken over the same pairs. A first epoch",
        "includes the reference's scores (in TRL's steps, or to fill the cache); a later step of TRL has them in it unless they",
        f"are precomputed. The checks at the start of a run cost preftune another {ours['once_seconds']:.0f} s, once.",
        "",
        *head("", "s/step", "first epoch, s/step", "peak memory, GB", "preftune is", "its memory"),
        row(
            f"**preftune**, {ours['setting']}",
            f"{ours['seconds_per_step']:.2f}",
            f"{ours['first_epoch_seconds_per_step']:.2f}",
            gb(ours["peak_rss_bytes"]),
            "",
            "",
        ),
    ]
    lines += [
        row(
            f"TRL, {one['setting'].replace(' | ', '; ')}",
            f"{one['seconds_per_step']:.2f}",
            "" if one["first_epoch_seconds_per_step"] is None else f"{one['first_epoch_seconds_per_step']:.2f}",
            gb(one["peak_rss_bytes"]),
            f"{one['times_slower']:.1f} x as fast",
            f"{100 * one['our_share_of_memory']:.0f} %",
        )
        for one in sorted(found["trl"], key=lambda one: one["seconds_per_step"])
    ]
    probes = sorted((run for run in found["runs"] if run["kind"] == "probe"), key=lambda run: run["seconds_per_step"])
    if probes or found["refused"]:
        timed = probes[0]["timed_steps"] if probes else 0
        lines += ["", f"TRL's grid, {timed} timed steps each, with the same allocator settings:", ""]
        lines += head("TRL", "s/step", "peak memory, GB")
    else:
        lines += ["", "TRL's grid was not run this time; [grid.md](grid.md) holds the last one."]
    lines += [row(run["setting"].split(" | ")[0], f"{run['seconds_per_step']:.2f}", gb(run["peak_rss_bytes"])) for run in probes]
    lines += [row(name.split(" | ")[0], f"left out: {why.splitlines()[0]}", "") for name, why in found["refused"].items()]
    flops = found.get("flops")
    if flops is not None:
        share, ceiling = 100 * flops["share_of_ceiling"], found["equality"]["ceiling_gflops"]["bfloat16"]
        useful = f"Useful products of a step: {flops['useful_tflop_per_step']:.2f} TFLOP"
        lines += [
            "",
            f"{useful}, {share:.0f} % of the ceiling of {ceiling:.0f} GFLOP/s in bfloat16.",
        ]
    return [*lines, "", *(equality_lines(found["equality"]) if "checks" in found["equality"] else [])]


def equality_lines(equal: Found) -> list[str]:
    mean, most, ceiling = equal["bfloat16_error_mean"], equal["bfloat16_error_max"], equal["ceiling_gflops"]
    gap, gradient = equal["float32_largest_gap_nats"], equal["float32_gradient_gap_relative"]
    return [
        f"Before any speed counts, the timed path (`{equal['kernel']}`) against a plain forward of transformers and PEFT:",
        f"float32 log-probs within {gap:.1e} nat, gradients within {gradient:.1e} relative; bfloat16 errors against float32:",
        f"mean {mean['ours']:.4f}, maximum {most['ours']:.3f} (the plain path's: {mean['plain']:.4f}, {most['plain']:.3f}).",
        f"Matrix products reach {ceiling['bfloat16']:.0f} GFLOP/s in bfloat16 and {ceiling['float32']:.0f} in float32 here.",
        "",
        *(f"- {'met' if is_met else '**missed**'}: {name}" for name, is_met in equal["checks"].items()),
    ]


def serving_lines(found: Found) -> list[str]:
    lines = [
        "## Serving: many chats at once",
        "",
        f"{found['chats']} greedy chats over HTTP, a base and three adapters in turn, a fixed number of tokens each; tiny: 256",
        "wide; smol: SmolLM2-135M's shape; random weights. In bfloat16 both runs tell the two best tokens of a place.",
        "",
        *head("model", "one after another, tokens/s", "all at once, tokens/s", "times", "same texts", "first differences"),
    ]
    for one in found["rows"]:
        differ = "" if one["dtype"] == "float32" else f"{one['of_these_close']} of {one['answers_that_differ']} within .1 nat"
        speeds = f"{one['tokens_per_second_alone']:.0f}", f"{one['tokens_per_second']:.0f}", f"{one['times']:.1f}"
        lines.append(row(f"{one['kind']} {one['dtype']}", *speeds, f"{one['same_texts']} of {found['chats']}", differ))
    return lines + peer_lines(found)


def peer_lines(found: Found) -> list[str]:
    """Servers side by side, all asked for the base."""
    lines = [
        "",
        "Beside other servers, in turn, medians; the same chats, all of the base in float32, because the others have no adapters",
        "over one base in one batch, or not alike. llama.cpp keeps keys and values in float16; its wheel is built without the",
        "newest instructions of a processor.",
        "",
        *head(
            "model",
            "server",
            "one after another, tokens/s",
            "all at once, tokens/s",
            "preftune is, one by one",
            "at once",
            "texts as preftune's",
        ),
    ]
    for kind, both in found["peers"].items():
        for name, one in both["servers"].items():
            speeds = f"{one['tokens_per_second_alone']:.0f}", f"{one['tokens_per_second']:.0f}"
            ratios = (f"{one[f'ours_to_{key}']:.2f} x" for key in ("tokens_per_second_alone", "tokens_per_second"))
            lines.append(
                row(
                    kind,
                    name,
                    *speeds,
                    *(ratios if name != "preftune" else ("", "")),
                    f"{one['same_texts']:.0f} of {found['chats']}",
                )
            )
        lines += [row(kind, name, f"left out: {why}", "", "", "", "") for name, why in both["left_out"].items()]
    return lines


LINES: Mapping[str, Callable[[Found], list[str]]] = {
    "parity": parity_lines,
    "quality": quality_lines,
    **dict.fromkeys(("lora", "full", "orpo", "sft"), lora_lines),
    "serving": serving_lines,
}


def page(folder: Path) -> str:
    """Every part whose result is in the folder."""
    lines = ["# Results", "", "Made by `make bench`; how to read it: [../README.md](../README.md).", ""]
    for name, of in LINES.items():
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        found = json.loads(path.read_text())
        where = found["machine"]
        lines += [*of(found), ""]
        lines += [f"- {'met' if is_met else '**missed**'}: {target}" for target, is_met in found.get("targets", {}).items()]
        lines += [
            "",
            f"{where['date']}, commit {where['commit']}; {where['processor']}, {where['cores']} cores, {where['memory_gb']} GB,",
            f"load {where['load_at_start']:.1f} at the start; {found['seconds'] / 60:.0f} minutes.",
            "",
        ]
    return "\n".join(lines)
