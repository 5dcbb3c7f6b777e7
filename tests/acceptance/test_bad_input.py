"""Bad input gets one clear line on stderr, the right exit code, and nothing is lost."""

import json
import os
import shutil
import subprocess
import threading
import time

import pytest


def one_line(done, code, *words):
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith(("error:", "blocker"))]
    assert len(told) == 1, done.stderr
    for word in words:
        assert word in told[0], f"{word!r} not in {told[0]!r}"
    return told[0]


def test_a_mistyped_key(preftune, recipe):
    recipe.write_text(recipe.read_text().replace("beta:", "betta:"))
    one_line(preftune("train", recipe), 2, "small.yaml", "unknown key 'betta'", "did you mean 'beta'")


def test_a_value_out_of_range(preftune, recipe):
    one_line(preftune("train", recipe, "beta=-1"), 2, "small.yaml", "beta", "a number above 0", "-1")


def test_an_override_that_the_shell_split_is_one_line(preftune, recipe):
    one_line(preftune("train", recipe, "probe={samples:", "2}"), 2, "override 'probe={samples:'", "not YAML", "quote")


def test_a_seed_that_no_generator_takes(preftune, recipe):
    for seed in ("-1", "99999999999999999999"):
        one_line(
            preftune("train", recipe, f"seed={seed}"), 2, "small.yaml: seed: write a whole number at least 0 and below", seed
        )


def test_broken_yaml_names_the_line(preftune, recipe):
    recipe.write_text("model: starter\nmethod: [dpo\n")
    one_line(preftune("plan", recipe), 1, "small.yaml, line 3", "not YAML")


def test_a_recipe_that_is_not_there(preftune):
    one_line(preftune("plan", "nowhere.yaml"), 1, "nowhere.yaml", "no such file")


def test_a_mistyped_verb(preftune):
    one_line(preftune("trian"), 2, "did you mean 'train'")


def test_a_mistyped_option(preftune):
    one_line(preftune("check", "--formt", "x", "y"), 2, "--format")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", b"", ["empty.jsonl", "empty"]),
        ("empty.csv", b"", ["empty.csv", "empty"]),
        ("empty.parquet", b"", ["empty.parquet", "empty"]),
        ("noise.parquet", b"PAR1 this is no parquet", ["noise.parquet"]),
        ("noise.jsonl.gz", b"\x1f\x8b\x08 no gzip", ["noise.jsonl.gz"]),
        ("data.xyz", b"{}", ["data.xyz"]),
    ],
)
def test_a_file_that_cannot_be_read(preftune, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    one_line(preftune("check", name), 1, *words)


def test_a_missing_data_file_is_a_blocker(preftune, recipe):
    one_line(preftune("train", recipe, "data=gone.jsonl"), 1, "unreadable_data", "gone.jsonl")


def test_a_line_of_200_megabytes(preftune, tmp_path):
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "')
        for _ in range(200):
            file.write(b"x" * 1_000_000)
        file.write(b'", "chosen": "a", "rejected": "b"}\n')

    def limit():
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    done = preftune("check", path, preexec_fn=limit)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    told = [line for line in (done.stdout + done.stderr).splitlines() if "long.jsonl" in line and "MiB" in line]
    assert len(told) >= 1, done.stdout + done.stderr
    assert max(map(len, (done.stdout + done.stderr).splitlines())) < 1000


def test_invalid_utf8_names_the_line(preftune, pairs):
    good = pairs.read_bytes().splitlines(keepends=True)
    pairs.write_bytes(good[0] + b'{"prompt": "\xff\xfe", "chosen": "a", "rejected": "b"}\n' + good[1])
    done = preftune("check", pairs, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert report["num_good"] == 2
    (row,) = report["bad_rows"]
    assert row["line"] == 2
    assert "utf" in (row["reason"] + row["detail"]).lower()


def test_a_model_folder_that_cannot_be_used(preftune, recipe, tmp_path, starter_model):
    one_line(preftune("train", recipe, "model=./nowhere/model"), 1, "no_model", "nowhere/model")
    (tmp_path / "hollow").mkdir()
    one_line(preftune("train", recipe, "model=hollow"), 1, "no_model", "hollow", "config.json")
    cut = tmp_path / "cut"
    shutil.copytree(starter_model, cut)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    one_line(preftune("train", recipe, "model=cut"), 1, "cut")


def fill_once_there_is_a_checkpoint(disk):
    """Somebody else fills the disk while the run is under way; preflight had found enough space."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not list(disk.glob("*/stages/*/checkpoints/step-*")):
        time.sleep(0.02)
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"0" * 1_000_000)
        except OSError:
            file.truncate(max(0, file.tell() - 5_000_000))


def test_a_disk_that_cannot_hold_the_checkpoints_is_refused(preftune, recipe, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=90m", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let this user mount a tmpfs")
    try:
        done = preftune("train", recipe, f"output={disk}", "max_steps=6", "checkpoints=5", "keep_checkpoints=5")
        one_line(done, 1, "disk_space", "keep_checkpoints")
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_one_line_and_keeps_what_was_saved(preftune, recipe, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        filler = threading.Thread(target=fill_once_there_is_a_checkpoint, args=(disk,), daemon=True)
        filler.start()
        done = preftune("train", recipe, f"output={disk}", "max_steps=6", "checkpoints=5", "keep_checkpoints=5")
        one_line(done, 1, "no space left", "resume")
        run = next(disk.glob("small-*"))
        saved = sorted(run.glob("stages/1-dpo/checkpoints/step-*"))
        assert saved, "the first checkpoints fit and must still be there"
        (tmp_path / "more").mkdir()
        copy = tmp_path / "more" / run.name
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns(".writing-*"))
        again = preftune("train", "--resume", copy)
        assert again.returncode == 0, again.stderr
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_errors_are_data_with_json(preftune, recipe):
    done = preftune("train", recipe, "data=gone.jsonl", "--json")
    error = json.loads(done.stdout)["error"]
    assert done.returncode == error["exit_code"] == 1
    assert error["findings"][0]["code"] == "unreadable_data"
    assert error["findings"][0]["way_out"]


def test_no_chat_template_names_the_way_out(preftune, recipe, tmp_path, shared_data):
    bare = shared_data / "models" / "tinystories-656k" / "hf"
    line = one_line(preftune("train", recipe, f"model={bare}"), 1, "no_chat_template", "chatml")
    assert "plain" in line
    assert preftune("plan", recipe, f"model={{name: {bare}, chat_template: plain}}").returncode == 0


def test_leakage_into_the_verdict_is_refused(preftune, recipe, pairs, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    first = json.loads(pairs.read_text(encoding="utf-8").splitlines()[0])
    prompts.write_text(json.dumps({"prompt": first["prompt"]}) + "\n", encoding="utf-8")
    judge = "{name: rules, rules: [{kind: complete, weight: 1}]}"
    one_line(preftune("run", recipe, f"evaluation.prompts={prompts}", f"evaluation.judge={judge}"), 1, "leak")
