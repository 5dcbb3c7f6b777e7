"""Every code that a finding may have: what it means and what to do. docs/preflight.md is written from this table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FindingKind:
    """One code: its level (``blocker``, ``warning``, or ``blocker or warning``), when it is found, and the way out."""

    level: str
    when: str
    way_out: str


FINDINGS: Mapping[str, FindingKind] = {
    # ---- the model ----------------------------------------------------------------------------------------------------
    "no_model": FindingKind(
        "blocker",
        "the model's name is no folder and no hub model that can be reached, or its files are no causal language model",
        "name a model folder, a hub id, or `model: starter`",
    ),
    "not_a_text_model": FindingKind(
        "blocker",
        "the model's config has a vision, audio or encoder part; the field is named",
        "name a decoder-only text model",
    ),
    "missing_file": FindingKind(
        "blocker",
        "a weight file that the index names is not there, or there are no safetensors at all",
        "copy or download the model again; `save_pretrained` writes safetensors",
    ),
    "damaged_file": FindingKind("blocker", "a weight file is truncated or damaged", "copy or download it again"),
    "missing_dependency": FindingKind(
        "blocker", "the model or a setting needs a package that is not installed", "install the package that is named"
    ),
    "no_gpu_to_offload": FindingKind(
        "blocker",
        "`activation_offloading: host` moves activations off a GPU, and there is none",
        "`activation_offloading: disk`, or `off`",
    ),
    "tracking_unavailable": FindingKind(
        "warning",
        "a sink with `required: false`, as in a server's jobs, lacks its package or its key; it is told nothing",
        "install the package or give the key that is named",
    ),
    "quantised_weights": FindingKind(
        "blocker",
        "the weights are quantised and the stage trains all of them, or the scheme is not one that can be trained on",
        "`adapter: lora`, or the unquantised model",
    ),
    "no_target_modules": FindingKind(
        "blocker",
        "`lora.target_modules` names no linear layer of the model",
        "`all-linear`, or one of the layer names that are listed",
    ),
    "unmatched_target": FindingKind(
        "warning", "some names in `lora.target_modules` match nothing, others do", "correct or remove them"
    ),
    "cannot_do_the_task": FindingKind(
        "blocker or warning",
        "the model predicts the chosen completions no better than their token frequencies do (mean NLL per token is not below "
        "the unigram entropy; asked from 2,000 chosen tokens on); a warning where the stage is sft",
        "an sft stage on such completions first, another model or chat template, or `--no-probe` (a job: `no_probe: true`)",
    ),
    "does_not_stop": FindingKind(
        "warning",
        "under half of 16 greedy answers to training prompts end by themselves",
        "an sft stage first; check that the chat template ends a turn with the model's end token",
    ),
    # ---- the data -----------------------------------------------------------------------------------------------------
    "unreadable_data": FindingKind("blocker", "a data file cannot be read", "`preftune check FILE` says more"),
    "no_chat_template": FindingKind(
        "blocker",
        "the data are conversations and the model has no chat template",
        "`model.chat_template: chatml`, `plain` or a file",
    ),
    "nothing_to_train": FindingKind(
        "blocker", "every row was left out; the reasons are counted", "`preftune check FILE` shows each row and why"
    ),
    "unreadable_judge": FindingKind(
        "blocker", "the judge of a generate stage cannot be read", "name a judge file, or write the judge in the recipe"
    ),
    "too_few_prompts": FindingKind(
        "blocker",
        "a generate stage has no prompt, or fewer than `limit` or `prompts_per_round` asks for",
        "give more prompts, or lower `prompts_per_round`, `limit` or `skip`",
    ),
    "no_variety": FindingKind(
        "blocker", "a generate stage samples at temperature 0, so all samples are equal", "`decoding.temperature`, 0.7 to 1.0"
    ),
    "nothing_made": FindingKind(
        "blocker",
        "a generate stage made no pair; the reasons are counted",
        "look at its samples, raise the temperature, or loosen the guards",
    ),
    "pairs_do_not_fit": FindingKind(
        "warning",
        "more than 5 % of the rows are longer than `max_length` or the model's positions",
        "raise `data.max_length`, or `data.too_long: cut`",
    ),
    "confidence_not_read": FindingKind(
        "warning",
        "pairs say a confidence below 1 and the loss (`sppo_hard`, `aot`, `aot_unpaired`) reads none, so they count as certain",
        "take a loss that reads confidences, such as `dpo`, or leave the doubted pairs out",
    ),
    "identical_pairs": FindingKind(
        "warning",
        "at least 1 % of the pairs have two identical completions, which teach nothing; they are left out",
        "look at how the pairs were made",
    ),
    "contradictory_pairs": FindingKind(
        "warning",
        "the same two completions to a prompt are preferred both ways; both rows are left out",
        "look at the rows that are named in `excluded.jsonl`",
    ),
    "near_contradictions": FindingKind(
        "warning",
        "two rows with nearly the same prompt prefer nearly the same two completions in opposite ways; they stay in",
        "look at the rows that are named, and remove the wrong one",
    ),
    "length_imbalance": FindingKind(
        "warning",
        "the longer completion is the chosen one in so many pairs (95 % interval) that length alone would win, or one side "
        "is on average half as long again as the other",
        "balance the pairs, divide by length (`length_normalised: true`), and read the length-controlled win rate",
    ),
    "leakage": FindingKind(
        "blocker",
        "held-out examples or verdict prompts are also in the training data",
        "take them out of one of the two, or write `data.select` as a share, which splits by prompt",
    ),
    "near_leakage": FindingKind("warning", "held-out prompts are nearly the same as training prompts", "as for leakage"),
    "empty_select": FindingKind("warning", "no example is held out", "set `data.select` to a file or a share such as 0.1"),
    "nothing_to_choose_by": FindingKind(
        "blocker",
        "early stopping or the best checkpoint is asked for, and nothing is held out or evaluated",
        "set `data.select` to a share such as 0.1 or a file, and `evals` to 1 or more",
    ),
    # ---- settings -----------------------------------------------------------------------------------------------------
    "no_learning": FindingKind(
        "blocker",
        "the run is one step long and the warm-up begins at learning rate 0",
        "lower `pairs_per_step`, or `warmup: 0`",
    ),
    "unusual_lr": FindingKind(
        "warning",
        "the learning rate is outside what is published for the method and the adapter (models above 50 million weights)",
        "the default is named",
    ),
    "unusual_beta": FindingKind(
        "warning", "beta is outside what is published for the loss and its length normalisation", "the usual value is named"
    ),
    "unusual_option": FindingKind(
        "warning", "another option of the loss is outside what is published", "the usual value is named"
    ),
    "label_weights": FindingKind(
        "warning",
        "the weights of desirable and undesirable completions do not balance their numbers, or one label is absent",
        "set one of the weights to `auto`",
    ),
    "many_epochs": FindingKind(
        "warning", "more epochs than help: the data are mostly memorised", "hold out a share and watch `eval_loss`"
    ),
    "dropout": FindingKind(
        "warning", "dropout acts on the policy and not on its reference", "`lora.dropout: 0` for margins without that noise"
    ),
    # ---- the machine --------------------------------------------------------------------------------------------------
    "memory": FindingKind(
        "blocker",
        "the predicted peak of memory is above what the machine, the container or the GPU has",
        "`preftune plan RECIPE --fix` proposes the setting that fits",
    ),
    "memory_tight": FindingKind(
        "warning", "the predicted peak is above 85 % of the memory", "`preftune plan RECIPE --fix`, or close other programs"
    ),
    "out_of_memory": FindingKind(
        "blocker",
        "the dry run of the largest pack ran out of memory; only the dry run died of it",
        "`preftune plan RECIPE --fix` proposes the setting that fits",
    ),
    "dry_run_failed": FindingKind(
        "blocker or warning",
        "the dry run stopped with an error that training would meet too; a warning where only the probe itself could not run",
        "mend what the fact says, or `--no-probe` (a job: `no_probe: true`)",
    ),
    "long_run": FindingKind(
        "warning", "the predicted time is above 24 hours", "fewer examples or epochs, a smaller model, or a GPU"
    ),
    "disk_space": FindingKind(
        "blocker or warning",
        "the checkpoints and the final model need more than the free space; a warning above 85 % of it",
        "free some space, choose another `output`, or lower `keep_checkpoints`",
    ),
    # ---- several processes ---------------------------------------------------------------------------------------------
    "distributed_method": FindingKind(
        "blocker",
        "torchrun started several processes, and a stage makes data, which one process does",
        "`preftune generate` first, or the recipe without torchrun",
    ),
    "distributed_precision": FindingKind(
        "blocker",
        "`distributed: ddp` would average bfloat16 gradients of full fine-tuning, which are added up in float32",
        "`distributed: fsdp2`, or `model.dtype: float32`",
    ),
    "distributed_quantised": FindingKind(
        "blocker", "`distributed: fsdp2` cannot share out quantised weights", "`distributed: ddp`, or the unquantised model"
    ),
    "distributed_optimizer": FindingKind(
        "blocker",
        "`optimizer: adamw_8bit` keeps moments of whole tensors, and `distributed: fsdp2` parts them",
        "`optimizer: adamw`, or `distributed: ddp`",
    ),
    "idle_ranks": FindingKind(
        "warning", "a step has fewer pairs than there are processes", "more `pairs_per_step`, or fewer processes"
    ),
    "distributed_dropout": FindingKind(
        "warning",
        "dropout draws on every process, so results depend on how many there are",
        "`lora.dropout: 0` where that matters",
    ),
    # ---- the proof ----------------------------------------------------------------------------------------------------
    "unreadable_evaluation": FindingKind(
        "blocker", "the evaluation's prompts, pairs or judge cannot be read", "mend the evaluation section"
    ),
    "judge_not_independent": FindingKind(
        "blocker",
        "the judge of the result is the judge that made the pairs, asks the same model, or shares words with it",
        "judge the result by another judge, or write `evaluation.same_judge_reason`",
    ),
    "judge_rewards_length": FindingKind("warning", "a rule of the judge pays for length", "measure a rate instead"),
    "small_verdict_set": FindingKind(
        "warning",
        "the smallest difference that so many verdict prompts show (80 % power) is more than twice the margin, so most "
        "results will be inconclusive",
        "more verdict prompts, or a wider `evaluation.margin`",
    ),
}
