"""Planted faults: one place of a real source file each, and the fast tests that must see it.

A fault is what somebody could write by mistake. ``old`` has to stand exactly once in the file, so that a change of the
source that moves the place is noticed here. Add one by a line; `python tests/mutation/run_faults.py NAME` tries it alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """name: what is wrong. file: under src/preftune. tests: node ids under tests/, of which one has to fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def area(self) -> str:
        """What it is about: losses, logps, packing, reference, normaliser."""
        areas = {"maths/losses": "losses", "maths/labels": "losses", "data/": "packing", "modeling/reference": "reference"}
        areas |= {"modeling/": "logps", "maths/logps": "logps", "training/views": "logps"}
        return next((area for start, area in areas.items() if self.file.startswith(start)), "normaliser")


def of(file: str, tests: str | tuple[str, ...], *places: tuple[str, str, str]) -> list[Fault]:
    """Faults of one file that the same tests have to see."""
    listed = (tests,) if isinstance(tests, str) else tests
    return [Fault(name, file, old, new, listed) for name, old, new in places]


MATHS = "property/maths"
LOSSES = [
    *of(
        "maths/losses/dpo.py", f"{MATHS}/test_dpo.py::test_dpo",
        ("flipped margin", "margins = chosen_rewards - rejected_rewards", "margins = rejected_rewards - chosen_rewards"),
        ("dropped reference", "logps.chosen_logratio, logps.rejected_logratio", "logps.policy_chosen, logps.policy_rejected"),
        ("wrong smoothing sign", "e * functional.logsigmoid(-margins)", "e * functional.logsigmoid(margins)"),
        ("early mean", 'functional.logsigmoid(-margins), "pair")', 'functional.logsigmoid(-margins).mean(), "pair")'),
        ("reward without beta", "self.beta * chosen, self.beta * rejected", "chosen, rejected"),
        ("length of the other side", "rejected / logps.rejected_tokens", "rejected / logps.chosen_tokens"),
    ),
    *of("maths/labels.py", f"{MATHS}/test_mix.py::test_confidences_are_label_smoothing_pair_by_pair",
        ("confidence for its complement", "1 - logps.confidence, label", "logps.confidence, label")),
    *of("maths/losses/ipo.py", f"{MATHS}/test_ipo.py::test_ipo", ("half the target", "1 / (2 * self.tau)", "1 / (4 * self.tau)")),
    *of("maths/losses/simpo.py", f"{MATHS}/test_simpo.py::test_simpo",
        ("target margin given, not asked", "rejected - self.gamma", "rejected + self.gamma")),
    *of("maths/losses/orpo.py", f"{MATHS}/test_orpo.py::test_orpo",
        ("odds of one side only", "- (rejected - log1mexp(rejected))", "- rejected")),
    *of("maths/losses/kto.py", f"{MATHS}/test_kto.py::test_kto",
        ("gradient through the reference point", ").detach().mean()", ").mean()"),
        ("reference point below zero", ".mean().clamp(min=0)", ".mean()")),
    *of("maths/losses/sft.py", f"{MATHS}/test_sft.py::test_sft", ("likelihood for its negative", "Term(-logps.logps", "Term(logps.logps")),
    *of("maths/losses/aot.py", f"{MATHS}/test_aot.py::test_aot",
        ("reference margins not sorted", "(logps.reference_chosen - logps.reference_rejected).sort().values",
         "logps.reference_chosen - logps.reference_rejected")),
    *of("maths/losses/bco_pair.py", f"{MATHS}/test_bco_pair.py::test_bco_pair",
        ("shift with the other sign", "self.shift - rejected", "-self.shift - rejected"),
        ("running mean of the last step only", "new * state[\"mean\"]) / count", "new * state[\"mean\"]) / new")),
    *of("maths/losses/wpo.py", f"{MATHS}/test_wpo.py::test_wpo",
        ("gradient through the weights", "tokens.concentration).detach()", "tokens.concentration)")),
    *of("maths/losses/rao_kupper.py", f"{MATHS}/test_ties.py::test_ties",
        ("ties and wins swapped", "logps.is_tie, tie, win", "logps.is_tie, win, tie")),
    *of("maths/losses/mix.py", f"{MATHS}/test_mix.py::test_the_weighted_sum_of_its_parts_and_of_their_gradients",
        ("weight of a part forgotten", "part.weight * term.weight)", "term.weight)")),
]  # fmt: skip

PACK = "unit/data/test_data_pack.py"
TOKENISE = "unit/data/test_data_tokenize.py"
PACKING = [
    *of(
        "data/pack.py", PACK,
        ("completion gathered one place late", "else at + index - 1 for", "else at + index for"),
        ("first token of the rejected scored behind the chosen", "start + prompt - 1 if index == 0", "at - 1 if index == 0"),
        ("positions of the rejected go on behind the chosen", "range(prompt, prompt + length)", "range(at - start, at - start + length)"),
        ("tokens that are context counted", "if is_scored]\n", "]\n"),
        ("prompt tokens counted", "num_tokens.append(len(scored))", "num_tokens.append(len(scored) + prompt)"),
        ("segment of the group, not of the completion", "[len(num_tokens)] * len(scored)", "[len(groups)] * len(scored)"),
        ("packs filled past their budget", "if used + size <= tokens_per_pack:", "if used <= tokens_per_pack:"),
    ),
    *of("data/tokenize.py", f"{TOKENISE}::test_only_assistant_turns_of_a_completion_are_scored",
        ("user turns scored", "or turn.start <= offsets[place][0] < turn.limit", "or True")),
    *of("data/tokenize.py", f"{TOKENISE}::test_completion_is_the_answer_and_one_end_token",
        ("last prompt token in the completion", "return ids[size:], [(start - joint, end - joint) for start, end in offsets[size:]], True",
         "return ids[size - 1 :], [(start - joint, end - joint) for start, end in offsets[size - 1 :]], True")),
    *of("data/partners.py", "unit/data/test_data_partners.py::test_partners_are_completions_of_other_prompts",
        ("partner of the same prompt", "for step in range(1, len(circle)):", "for step in range(len(circle)):")),
    *of("data/partners.py", "unit/data/test_data_partners.py::test_examples_of_one_prompt_take_the_next_prompts_completions_in_turn",
        ("one partner for every example of a prompt", "offered[(turn + shift) % len(offered)]", "offered[shift % len(offered)]")),
]  # fmt: skip

METRICS = tuple(
    f"{MATHS}/test_metrics.py::{name}"
    for name in (
        "test_golden_values", "test_terms_of_different_units_are_divided_by_their_own_count", "test_pair_view_and_its_gradient",
        "test_sums_do_not_depend_on_what_stands_before",
    )
)  # fmt: skip
ATTENTION = "unit/modeling/test_attention.py::test_every_path_equals_the_written_out_mask"
HEAD = "unit/modeling/test_head.py"
LAID_OUT = "unit/modeling/test_laid_out.py"
NATIVE = "unit/modeling/test_native_attention.py::test_it_is_the_softmax_in_float32_rounded_once_on_the_way"
VIEWS = "unit/training/test_views.py"
LOGPS = [
    *of(
        "maths/logps.py", (*METRICS, f"{VIEWS}::test_pairs_with_everything"),
        ("mean for the sum", "SequenceLogps(sums.to(token_logps.dtype), num_tokens)",
         "SequenceLogps(sums.to(token_logps.dtype) / num_tokens, num_tokens)"),
        ("sums in float32", "dtype=torch.float64, device=token_logps.device)\n    sums = zeros.index_add(0, segments, token_logps.double())",
         "dtype=token_logps.dtype, device=token_logps.device)\n    sums = zeros.index_add(0, segments, token_logps)"),
        ("chosen and rejected swapped", "return chosen, chosen + 1", "return chosen + 1, chosen"),
        ("rejected takes the chosen one's policy", "policy_rejected=of(policy.logps, rejected)", "policy_rejected=of(policy.logps, chosen)"),
        ("rejected takes the chosen one's reference", "reference_rejected=of(frozen, rejected)", "reference_rejected=of(frozen, chosen)"),
        ("length of the rejected for the chosen", "chosen_tokens=of(policy.num_tokens, chosen)",
         "chosen_tokens=of(policy.num_tokens, rejected)"),
    ),
    *of(
        "training/views.py", VIEWS,
        ("packs start at the same completion", "pack.segments + start for", "pack.segments for"),
        ("single tokens of the other side", "segments % 2 == side", "segments % 2 != side"),
        ("places counted over the pack", "kept - first[segments[kept]]", "kept"),
        ("no confidence is half of one", "1.0 if one.confidence is None", "0.5 if one.confidence is None"),
    ),
    *of(
        "modeling/group_parts.py", f"{ATTENTION}[8-12000-512-1024-False-None-4]",
        ("rejected sees chosen", "| ((owner[keys] != 0) & (owner[keys] != owner[rows]))", ""),
        ("window one token too wide", "<= place[rows] - window", "< place[rows] - window"),
    ),
    *of(
        "modeling/group_parts.py", f"{ATTENTION}[8-0-512-1024-False-None-4]",
        ("rejected meets the prompt short of its last token", "((0, prompt), own) if prompt", "((0, prompt - 1), own) if prompt"),
    ),
    *of(
        "modeling/group_attention.py", f"{ATTENTION}[8-0-512-1024-False-None-4]",
        ("parts overwrite the keys' gradient", "dk[keys].add_(of_k", "dk[keys].copy_(of_k"),
    ),
    *of(
        "modeling/group_attention.py", f"{ATTENTION}[8-0-512-1024-False-None-4]",
        ("slope of the scores without their scale", "a, b, beta=0, alpha=scale", "a, b, beta=0, alpha=1.0"),
        ("gradient of the keys from the values", "of_k = _scaled(ds.transpose(1, 2)", "of_k = _scaled(p.transpose(1, 2)"),
    ),
    *of(
        "modeling/head.py",
        (f"{HEAD}::test_value_and_gradients_in_float64", f"{HEAD}::test_sums_are_float32_for_a_bfloat16_head"),
        ("log-softmax in bfloat16", "return torch.float64 if dtype == torch.float64 else torch.float32", "return dtype"),
        ("slope of the cap forgotten", "1.0 - (logits / spec.cap) ** 2", "1.0 - 0.0 * logits"),
        ("scale of the logits not in the gradient", "unit * (grad * spec.scale)[:, None]", "unit * grad[:, None]"),
        ("trained head without its target", "pull.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=pull.dtype))", "pass"),
    ),
    *of(
        "modeling/laid_out.py", f"{LAID_OUT}::test_a_weight_that_changed_is_multiplied_as_it_stands",
        ("a changed weight is not seen", "return weight._version == self.version and weight.data_ptr() == self.address", "return True"),
    ),
    *of(
        "modeling/native/groups.h", NATIVE,
        ("native: a row sees the next token", "whole(first + count, KEYS) / KEYS, first + 1, true}",
         "whole(first + count, KEYS) / KEYS, first + 2, true}"),
        ("native: the rejected sees the chosen", "whole(sequence.prompt, KEYS) / KEYS, sequence.prompt, false}",
         "whole(sequence.prompt, KEYS) / KEYS, whole(sequence.prompt, KEYS), false}"),
    ),
    *of(
        "modeling/native/group_attention.cpp", NATIVE,
        ("native: softmax's gradient without its mean", "_mm512_sub_ps(c[i + side][j], _mm512_set1_ps(delta[i + side]))", "c[i + side][j]"),
    ),
    *of(
        "modeling/native/elementwise.cpp", "unit/modeling/test_native_kernels.py::test_each_computes_what_its_function_says_rounded_once",
        ("native: a norm's gradient without its mean", "add(mul(sub(g, mul(h, mean)), s), to_float(residual + at + d))",
         "add(mul(g, s), to_float(residual + at + d))"),
        ("native: turned back as forth", "sign > 0 ? d : half + d", "d"),
        ("native: the gate's slope is its value", "add(open, mul(silu, sub(set(1.0f), open)))", "open"),
        ("native: log p without its sum", "score - top - std::log(sum)", "score - top"),
    ),
    *of(
        "modeling/native/low_rank.cpp", "unit/modeling/test_native_low_rank.py::test_it_errs_no_more_than_torchs_products",
        ("native: an adapter's gradient without its scale", "one.scale * total(ranks", "total(ranks"),
        ("native: columns as they were unpacked", "c / 32 * 32 + (c % 8 / 4) * 16 + c % 32 / 8 * 4 + c % 4", "c"),
        ("native: the last odd row is left out", "i + 1 < count ? from + (first + i + 1) * ranks : nullptr", "nullptr"),
    ),
    *of("modeling/native_attention.py", "unit/modeling/test_native_attention.py::test_only_what_it_can_is_given_to_it",
        ("native: a window that hides is passed over", "window >= one.prompt + max(one.completions)", "window >= 0")),
    *of("modeling/laid_out.py", f"{LAID_OUT}::test_merged_adapters_are_seen_though_they_change_data",
        ("merged adapters are not seen", 'getattr(self.module, "merged", False)', "False")),
    *of("modeling/head.py", f"{HEAD}::test_concentration_is_the_log_of_the_sum_of_squares",
        ("sum of p for the sum of squares", "parts.append(torch.logsumexp(2 * every, -1))", "parts.append(torch.logsumexp(every, -1))")),
    *of("modeling/forward.py", "invariant/training/test_concentration.py::test_every_way_scores_the_prompts_too",
        ("prompt's last place predicts a completion", "group.start + group.prompt - 1)]", "group.start + group.prompt)]"),
        ("plain rows read one place late", "first = len(example.prompt_ids) - 1", "first = len(example.prompt_ids)")),
]  # fmt: skip

CACHE = "invariant/modeling/test_reference_cache.py"
REFERENCE = [
    *of(
        "modeling/reference.py", f"{CACHE}::test_every_token_is_in_the_key",
        ("cache key without the prompt", "    state.update(prompt)\n", ""),
        ("cache key without what is scored", "    state.update(bytes(completion.scored))\n", ""),
        ("cache key without the completion", '    state.update(np.asarray(completion.ids, dtype="<i8").tobytes())\n', ""),
    ),
    *of("modeling/reference.py", f"{CACHE}::test_adapters_of_any_rank_and_seed_trained_or_not_have_the_base_as_reference",
        ("reference with the adapter on", "with torch.no_grad(), in_place():", "with torch.no_grad():")),
    *of("modeling/reference.py", f"{CACHE}::test_a_flipped_byte_costs_its_example_only",
        ("checksum not looked at", "if _checksum(key, values) != self._where[key][3]:", "if not key:")),
    *of("modeling/reference.py", f"{CACHE}::test_whatever_moves_the_scores_is_in_the_identity",
        ("weights not in the identity", "        state.update(_bytes_of(weight).data)\n", "")),
    *of("modeling/reference.py", f"{CACHE}::test_a_reference_has_no_dropout_even_where_its_adapters_are_on",
        ("reference with the policy's dropout", "    scorer.model.train(False)\n    try:", "    try:")),
    *of("modeling/reference.py", f"{CACHE}::test_buffers_that_are_saved_are_weights",
        ("saved buffers not in the identity", "(*base.named_parameters(), *_saved_buffers(base))", "base.named_parameters()")),
]  # fmt: skip

STEP = "invariant/training/test_packing.py::test_any_packing_gives_the_same_step"
BATCHWISE = "invariant/training/test_batchwise.py"
NORMALISER = [
    *of(
        "maths/metrics.py", METRICS,
        ("mean of the pack for the global count", "term.weight * term.values.sum() / counts[term.unit]", "term.weight * term.values.mean()"),
        ("one count for every unit", "term.weight * term.values.sum() / counts[term.unit]", 'term.weight * term.values.sum() / counts["pair"]'),
        ("equal rewards count as lost", "0.5 * (margins == 0)", "0.0 * (margins == 0)"),
        ("rewards of both sides swapped", "margins = chosen - rejected\n", "margins = rejected - chosen\n"),
    ),
    *of(
        "maths/metrics.py", f"{MATHS}/test_metrics.py",
        ("change per token by the other side's tokens", "changes[1] / logps.rejected_tokens.clamp", "changes[1] / logps.chosen_tokens.clamp"),
        ("ties count by their margin", "    if logps.is_tie is not None:\n        wins = torch.where(logps.is_tie, 0.5, wins)\n", ""),
        ("undesirable means by the desirable count", "num_desirable, num_desirable, num_undesirable, num_undesirable)",
         "num_desirable, num_desirable, num_undesirable, num_desirable)"),
    ),
    *of("training/tally.py", "invariant/training/test_packing.py::test_any_packing_gives_the_same_step[kto-lora]",
        ("labels of the first pack", "labels = [label for pack in packs for example", "labels = [label for pack in packs[:1] for example")),
    *of(
        "training/watch.py", f"{BATCHWISE}::test_held_out_examples_are_scored_at_the_state_and_without_dropout",
        ("held-out examples with dropout", "            trainee.model.eval()\n", ""),
        ("held-out examples at the first state", "trainee.objective.at(state.loss_state), trainee", "trainee.objective.at({}), trainee"),
        ("no dropout after an evaluation", "            trainee.model.train()\n", ""),
    ),
    *of(
        "training/balance.py", "invariant/training/test_experts.py::test_packs_of_a_step_weigh_by_their_tokens",
        ("packs of experts weigh alike", "self._sizes[index] / sum(self._sizes)", "1 / len(self._sizes)"),
        ("auxiliary loss of every pack whole", "scorer.router_weight * share", "scorer.router_weight"),
    ),
    *of("training/optim.py", "unit/training/test_optim.py::test_state_goes_round",
        ("weights of a checkpoint in the masters alone", "self.parameters[name].copy_(master)\n            state", "pass\n            state")),
    *of("training/ledger.py", "unit/training/test_ledger_deviation.py",
        ("deviations not in the spread of their step", '(margin - row["mean"]) / spread if', '(margin - row["mean"]) if')),
    *of("training/resume.py", "invariant/training/test_selection.py::test_patience_survives_a_stop",
        ("best evaluation forgotten by a resume", "loss_state, **selection)", "loss_state)")),
    *of("training/resume.py", "invariant/training/test_resume.py::test_sigterm_checkpoints_and_stops",
        ("tokens counted anew after a resume", 'int(facts["num_tokens"])', "0"),
        ("seconds counted anew after a resume", 'float(facts["seconds"])', "0.0")),
    *of(
        "training/tally.py", f"{STEP}[sft-lora]",
        ("counts of the first pack for the step", "self.counts = counts_of(packs)", "self.counts = counts_of(packs[:1])"),
        ("mean over packs, each by its own tokens", "share = reduce_terms(terms, self.counts)",
         "share = reduce_terms(terms, {unit: int(logps.num_tokens.sum()) for unit in self.counts})"),
    ),
    *of(
        "training/step.py", f"{STEP}[kto-lora]",
        ("only the last pack has a gradient", "objective.spread.backward(tally.add(*objective(pack, mismatched), index))",
         "optimiser.zero_grad(); objective.spread.backward(tally.add(*objective(pack, mismatched), index))"),
        ("reference point of the pack for that of the step",
         "objective.spread.backward(tally.add(*objective(pack, mismatched), index))",
         "objective.spread.backward(tally.add(*objective(pack), index))"),
    ),
    *of("training/step.py", f"{BATCHWISE}::test_two_passes_are_the_gradient_of_one_graph_with_dropout",
        ("other dropout in the second pass", "_put_back(device, generators[index])\n", "pass\n")),
    *of("training/step.py", f"{BATCHWISE}::test_the_slopes_of_prompts_reach_the_weights",
        ("slopes of the prompts lost", "torch.cat([parts[index] for parts in split])",
         "torch.cat([parts[index] * (at == 0) for at, parts in enumerate(split)])")),
    *of("training/step.py", f"{BATCHWISE}::test_a_step_that_fails_leaves_the_state_as_it_was",
        ("state of a failed step kept", "    norm = optimiser.clip(max_grad_norm)\n",
         "    loss_state is not None and loss_state.update(state)\n    norm = optimiser.clip(max_grad_norm)\n")),
]  # fmt: skip

FAULTS = [*LOSSES, *PACKING, *LOGPS, *REFERENCE, *NORMALISER]

# of places that have several faults already, or that have tests of their own with faults in memory: `make soak` runs these too
ONLY_IN_SOAK = frozenset({
    "reward without beta", "length of the other side", "half the target", "target margin given, not asked",
    "odds of one side only", "reference point below zero", "likelihood for its negative", "running mean of the last step only",
    "weight of a part forgotten", "packs filled past their budget", "segment of the group, not of the completion",
    "chosen and rejected swapped", "length of the rejected for the chosen", "no confidence is half of one",
    "gradient of the keys from the values", "trained head without its target", "cache key without the completion",
    "rewards of both sides swapped", "equal rewards count as lost", "window one token too wide",
    "undesirable means by the desirable count", "auxiliary loss of every pack whole", "labels of the first pack",
    "best evaluation forgotten by a resume", "tokens counted anew after a resume", "seconds counted anew after a resume", "no dropout after an evaluation",
})  # fmt: skip
QUICK = [fault for fault in FAULTS if fault.name not in ONLY_IN_SOAK]

# what the machinery itself has to report: name -> (fault, verdict)
CONTROLS = [
    (Fault("no fault at all", "data/pack.py", "A group is never split.", "A group is not split.", (PACK,)), "survived"),
    (Fault("a place that is gone", "data/pack.py", "no such line stands here", "", (PACK,)), "old stands 0 times"),
    (Fault("a place that is not one", "data/pack.py", "segments", "parts", (PACK,)), "old stands"),
    (Fault("a file that does not compile", "data/pack.py", "def pack_of(", "def pack_of((", (PACK,)), "not loaded"),
    (Fault("a test that is gone", "data/pack.py", "start + prompt - 1", "start + prompt", (f"{PACK}::test_gone",)), "not loaded"),
]  # fmt: skip
