"""Together's compare, score and classify, and OpenAI's evals, by their own packages in strict mode. Prints one JSON line."""

import json
import sys
import time
from pathlib import Path

import openai
import together

rows_file = Path(sys.argv[1])
other = together.Together(_strict_response_validation=True)
client = openai.OpenAI(_strict_response_validation=True)
deadline = time.time() + 900


def ended(ask, over):
    while (found := ask()).status not in over:
        assert time.time() < deadline, found
        time.sleep(0.3)
    return found


# ---- Together ----
file = other.files.upload(rows_file, purpose="eval", check=False)
judge = {"model": "starter", "model_source": "serverless", "system_template": "Which answer suits {{ prompt }} better?"}
writer = {
    "model": "starter", "model_source": "dedicated", "system_template": "", "input_template": "{{ prompt }}", "max_tokens": 12,
    "temperature": 0.0,
}  # fmt: skip
common = {"input_data_file_path": file.id, "judge": judge}
asked = {
    "compare": {**common, "model_a": "a", "model_b": writer},
    "score": {**common, "model_to_evaluate": "a", "min_score": 1, "max_score": 10, "pass_threshold": 5},
    "classify": {**common, "model_to_evaluate": "b", "labels": ["good", "bad"], "pass_labels": ["good"]},
}
made = {kind: other.evals.create(type=kind, parameters=parameters).workflow_id for kind, parameters in asked.items()}
statuses = {
    kind: ended(lambda one=one: other.evals.status(one), {"completed", "error", "user_error"}) for kind, one in made.items()
}
jobs = {kind: other.evals.retrieve(one) for kind, one in made.items()}
results = {kind: job.results.to_dict(mode="json") for kind, job in jobs.items()}
judged = [json.loads(line) for line in other.files.content(results["compare"]["result_file_id"]).read().splitlines()]
listed = [job.workflow_id for job in other.evals.list(limit=50)]

# ---- OpenAI ----
place = [{"role": "user", "content": "Q: {{item.prompt}}\nA: {{sample.output_text}}\nGood or bad?"}]
criteria = [
    {"type": "label_model", "name": "good", "model": "starter", "labels": ["good", "bad"], "passing_labels": ["good", "bad"],
     "input": [{"role": "developer", "content": "Answer good or bad."}, *place]},
    {"type": "score_model", "name": "score", "model": "starter", "range": [0, 10], "pass_threshold": 0, "input": place},
    {"type": "string_check", "name": "same", "operation": "ilike", "input": "{{sample.output_text}}", "reference": "{{item.a}}"},
]  # fmt: skip
schema = {"type": "object", "properties": {"prompt": {"type": "string"}, "a": {"type": "string"}}, "required": ["prompt"]}
kept = client.evals.create(
    name="smoke", data_source_config={"type": "custom", "item_schema": schema, "include_sample_schema": True},
    testing_criteria=criteria,
)  # fmt: skip
rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
content = [{"item": row, "sample": {"output_text": row["a"]}} for row in rows[:2]]
content[1]["sample"]["output_text"] = "something else"
brought = client.evals.runs.create(
    kept.id, name="brought", data_source={"type": "jsonl", "source": {"type": "file_content", "content": content}}
)
written = client.evals.runs.create(
    kept.id, name="written",
    data_source={
        "type": "completions", "model": "starter", "sampling_params": {"max_completion_tokens": 8, "temperature": 0, "seed": 1},
        "input_messages": {"type": "template", "template": [{"role": "user", "content": "{{item.prompt}}"}]},
        "source": {"type": "file_content", "content": [{"item": rows[0]}]},
    },
)  # fmt: skip
over = {"completed", "failed", "canceled"}
brought = ended(lambda: client.evals.runs.retrieve(brought.id, eval_id=kept.id), over)
written = ended(lambda: client.evals.runs.retrieve(written.id, eval_id=kept.id), over)
items = [item.to_dict() for item in client.evals.runs.output_items.list(brought.id, eval_id=kept.id)]
answers = [item.to_dict() for item in client.evals.runs.output_items.list(written.id, eval_id=kept.id)]
one = client.evals.runs.output_items.retrieve(items[1]["id"], eval_id=kept.id, run_id=brought.id)
refused = []
for grader in ({"type": "python", "name": "p", "source": "import os"}, {**criteria[2], "operation": "regex"}):
    try:
        client.evals.create(data_source_config={"type": "custom", "item_schema": schema}, testing_criteria=[grader])
    except openai.BadRequestError as error:
        refused.append(error.message)
graded = client.fine_tuning.alpha.graders.run(
    grader={"type": "string_check", "name": "eq", "operation": "eq", "input": "{{sample.output_text}}", "reference": "x"},
    model_sample="x",
)
runs = [run.id for run in client.evals.runs.list(kept.id)]
renamed = client.evals.update(kept.id, name="renamed").name
assert kept.id in [found.id for found in client.evals.list()]
client.evals.runs.delete(written.id, eval_id=kept.id)
client.evals.delete(kept.id)
print(
    json.dumps(
        {
            "statuses": {kind: found.status for kind, found in statuses.items()},
            "results": results,
            "judged": judged,
            "listed": [made[kind] in listed for kind in made],
            "parameters": jobs["compare"].parameters,
            "brought": brought.to_dict(),
            "written": written.to_dict(),
            "items": items,
            "answers": answers,
            "one": one.id == items[1]["id"],
            "refused": refused,
            "reward": graded.reward,
            "runs": len(runs),
            "renamed": renamed,
        }
    )
)
