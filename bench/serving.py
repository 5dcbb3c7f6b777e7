"""How much faster are 32 chats at once than one after another, a base and three adapters? And beside other servers?

Every figure goes over HTTP, from this process to a server of its own, greedily and with a fixed number of tokens. Before
speed counts, texts are compared: each conversation alone against the same one among 32. In bfloat16, where products of
other shapes round otherwise, the first token that differs must be one whose two best lie within .1 nat.

The peers, `transformers serve` and llama.cpp's server, are asked for the base alone, because adapters over one base in one
batch is what they do not have, or not alike; so is preftune beside them, in turn, each round in a process of its own. A peer
is left out, with the reason, where it is not installed (bench/environments/make.sh serve, llama).
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import inputs
import measure

KEY = "bench-key-0123456789"
TEMPLATE = "{% for m in messages %}{{ ' ' + m['content'] }}{% endfor %}"
NAMES = ("base", "one", "two", "three")
CHATS = 32
CLOSE = 0.1  # nat
TARGET = 4.0
SERVE = measure.ROOT / ".venv-serve" / "bin" / "python"
LLAMA = measure.ROOT / ".venv-llama" / "bin" / "python"
NATIVE = LLAMA.with_name("llama-server")  # built for this processor, where somebody has (see llama.txt)
LISTENING = r"listening on http://127\.0\.0\.1:(\d+)"
TOKENS = {"tiny": 64, "smol": 24}
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "smol": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
VOCABULARY = {"tiny": 4096, "smol": inputs.VOCABULARY}


def words(kind: str) -> list[str]:
    """What the model's vocabulary holds beside bytes: letters a to zzzz, as many as there is room for."""
    letters = string.ascii_lowercase
    every = ("".join(one) for length in range(1, 5) for one in itertools.product(letters, repeat=length))
    return list(itertools.islice(every, VOCABULARY[kind] - 4 - 256))


def tokenizer_of(kind: str) -> Any:
    """Byte-level BPE, the kind that GGUF has too; a word and the space before it are one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space = "\u0120"  # as byte-level BPE writes it
    listed = words(kind)
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(space + word for word in listed)]
    merges = [(space + word[:-1], word[-1]) for word in listed]  # a shorter word comes before those that begin with it
    tokenizer = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    raw = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    raw.chat_template = TEMPLATE
    return raw


def make_models(folder: Path, kind: str) -> None:
    """A base with random weights, amplified so that it is sure of something, and three adapters of different shapes."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from preftune.core.recipe import ModelConfig
    from preftune.modeling.gguf_file import write_gguf
    from preftune.modeling.load import load_model

    torch.manual_seed(0)
    size = VOCABULARY[kind]
    config = LlamaConfig(
        vocab_size=size, max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **SHAPES[kind],
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.0 if "embed" in name else 3.0)
    model.save_pretrained(folder / "base")
    tokenizer_of(kind).save_pretrained(folder / "base")
    write_gguf(load_model(ModelConfig(name=str(folder / "base")), precision="float32"), folder / "base.gguf", "f32")
    targets: list[Any] = ["all-linear", ["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]]
    for name, modules, rank in zip(NAMES[1:], targets, (16, 8, 32), strict=True):
        adapted = peft.get_peft_model(
            LlamaForCausalLM.from_pretrained(folder / "base"),
            peft.LoraConfig(r=rank, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM"),
        )
        adapted.peft_config["default"].base_model_name_or_path = str((folder / "base").resolve())
        adapted.save_pretrained(str(folder / name))


def conversations(kind: str) -> list[tuple[str, str]]:
    """(model, prompt) of every chat: 8 to 39 words, the four models in turn."""
    import random

    draw, known = random.Random(0), words(kind)
    return [(NAMES[at % len(NAMES)], " ".join(draw.choice(known) for _ in range(draw.randrange(8, 40)))) for at in range(CHATS)]


class Asked:
    """A server to ask. is_ours: it takes ``ignore_eos``; the peer refuses keys that it does not know."""

    def __init__(self, port: int, kind: str, *, is_ours: bool = True) -> None:
        self.port, self.kind, self.is_ours, self.local = port, kind, is_ours, threading.local()

    def ask(self, model: str, prompt: str, **more: Any) -> dict[str, Any]:
        """The answer to one chat, on the thread's own connection."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": TOKENS[self.kind],
            "temperature": 0,
        }
        body |= more
        if self.is_ours:
            body["ignore_eos"] = True
        connection = getattr(self.local, "connection", None)
        if connection is None:
            connection = self.local.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=280)
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body),
            {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        )  # fmt: skip
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise measure.RunFailed(f"status {answer.status}: {text[:300]!r}")
        return json.loads(text)

    def timed(self, chats: Sequence[tuple[str, str]], at_once: int, **more: Any) -> tuple[float, int, list[dict[str, Any]]]:
        """(seconds, tokens, choices) of all chats with so many in flight."""
        start = time.perf_counter()
        with ThreadPoolExecutor(at_once) as pool:
            answers = list(pool.map(lambda chat: self.ask(*chat, **more), chats))
        seconds = time.perf_counter() - start
        tokens = sum(one["usage"]["completion_tokens"] for one in answers)
        return seconds, tokens, [one["choices"][0] for one in answers]


@contextmanager
def running(command: Sequence[str], ready: str, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """A server process; what it said when it was ready."""
    log = folder / "log.txt"
    with log.open("wb") as said:
        process = subprocess.Popen(command, env={**measure.environment(allocator=False), **environment}, stdout=said, stderr=said)
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(ready, log.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise measure.RunFailed("\n".join(log.read_text().splitlines()[-12:]))
            time.sleep(0.1)
        yield found.group(0)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def ours(folder: Path, kind: str, dtype: str) -> dict[str, Any]:
    """Speed one after another and at once, and whether every text is the same."""
    home = {"PREFTUNE_HOME": str(folder / f"home-{dtype}"), "PREFTUNE_CACHE": str(folder / "cache"), "PREFTUNE_API_KEY": KEY}
    command = [sys.executable, "-m", "preftune", "serve", "--port", "0", "--slots", "0", "--dtype", dtype]
    command += [word for name in NAMES for word in ("--model", f"{name}={folder / name}")]
    chats = conversations(kind)
    with running(command, r"listening on http://127\.0\.0\.1:(\d+)", folder, home) as said:
        asked = Asked(int(said.rpartition(":")[2]), kind)
        asked.timed(chats[:4], 4)  # the model is loaded, every adapter too
        # in bfloat16 every token is told with the two best at its place, alone and at once
        more = {"logprobs": True, "top_logprobs": 2} if dtype == "bfloat16" else {}
        together, tokens, got = min((asked.timed(chats, CHATS, **more) for _ in range(2)), key=lambda one: one[0])
        alone, _, wanted = asked.timed(chats, 1, **more)
    found = {"kind": kind, "dtype": dtype, "tokens": tokens, "seconds_at_once": together, "seconds_alone": alone}
    found["same_texts"] = sum(a["message"] == b["message"] for a, b in zip(got, wanted, strict=True))
    if more:
        found |= first_differences(wanted, got)
    return found | {"times": alone / together, "tokens_per_second": tokens / together, "tokens_per_second_alone": tokens / alone}


def first_differences(wanted: list[dict[str, Any]], got: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each answer that differs: how far apart the two best were, alone, where it first does."""
    gaps = []
    for answers in zip(wanted, got, strict=True):
        one, other = (answer["logprobs"]["content"] for answer in answers)
        place = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a["bytes"] != b["bytes"]), None)
        if place is not None:
            best = one[place]["top_logprobs"]
            gaps.append(best[0]["logprob"] - best[1]["logprob"])
    close = sum(gap <= CLOSE for gap in gaps)
    return {"answers_that_differ": len(gaps), "of_these_close": close, "largest_gap_nats": max(gaps, default=0.0)}


def servers(folder: Path) -> tuple[dict[str, tuple[list[str], str, str]], dict[str, str]]:
    """(command, what it says when it is ready, the base's name there) of every server; and why others are left out."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
    base, gguf, context = str(folder / "base"), str(folder / "base.gguf"), 512
    ours = [
        sys.executable,
        "-m",
        "preftune",
        "serve",
        "--port",
        "0",
        "--slots",
        "0",
        "--dtype",
        "float32",
        "--model",
        f"base={base}",
    ]
    found, left_out = {"preftune": (ours, LISTENING, "base")}, {}
    if SERVE.is_file():
        serve = [str(SERVE), "-c", "from transformers.cli.transformers import main; main()", "serve", "--port", "{port}"]
        serve += ["--device", "cpu", "--dtype", "float32", "--continuous-batching", "--cb-num-blocks", "128"]
        found["transformers serve"] = (serve, "Uvicorn running", base)  # said once the port is open
    else:
        left_out["transformers serve"] = "its environment is absent: bench/environments/make.sh serve"
    if NATIVE.is_file():
        llama = [str(NATIVE), "-m", gguf, "--port", "{port}", "--parallel", str(CHATS), "--ctx-size", str(CHATS * context)]
        found["llama.cpp, built here"] = ([*llama, "--threads", threads], "listening on http", "base")
    elif LLAMA.is_file():
        runner = str(measure.BENCH / "environments" / "llama_server.py")
        llama = [str(LLAMA), runner, gguf, "--parallel", str(CHATS), "--context", str(context), "--threads", threads]
        found["llama.cpp, wheel"] = (llama, LISTENING, "base")
    else:
        left_out["llama.cpp"] = "its environment is absent: bench/environments/make.sh llama"
    return found, left_out


def one_round(folder: Path, kind: str, name: str, server: tuple[list[str], str, str]) -> tuple[dict[str, float], list[str]]:
    """Tokens a second of one server: 32 chats of the base at once, and the first eight one after another; the 32 texts."""
    command, ready, model = server
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = {"PREFTUNE_HOME": str(folder / "home-base"), "PREFTUNE_CACHE": str(folder / "cache"), "PREFTUNE_API_KEY": KEY}
    chats = [(model, prompt) for _, prompt in conversations(kind)]
    with running([word.replace("{port}", str(port)) for word in command], ready, folder, home) as said:
        if ready == LISTENING:
            port = int(said.rpartition(":")[2])
        asked = Asked(port, kind, is_ours=name != "transformers serve")
        asked.timed(chats[:4], 4)
        together, tokens, got = asked.timed(chats, CHATS)
        alone, few, _ = asked.timed(chats[:8], 1)
    texts = [one["message"]["content"] for one in got]
    return {"tokens_per_second": tokens / together, "tokens_per_second_alone": few / alone, "tokens": tokens}, texts


def beside_peers(folder: Path, kind: str, rounds: int) -> dict[str, Any]:
    """Every server in turn, so many times; medians, and how many times as fast preftune is."""
    found, left_out = servers(folder)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in found}
    wanted: list[str] = []  # preftune is the first
    for _ in range(rounds):
        for name in list(found):
            try:
                figures, texts = one_round(folder, kind, name, found[name])
            except measure.RunFailed as error:
                if name == "preftune":
                    raise
                left_out[name] = f"it failed: {str(error).splitlines()[-1]}"
                del found[name], taken[name]
                continue
            wanted = wanted or texts
            figures["same_texts"] = sum(one == other for one, other in zip(texts, wanted, strict=True))
            taken[name].append(figures)
            measure.say(f"{kind} {name}: {json.dumps(figures)}")
    rows = {
        name: {key: statistics.median(one[key] for one in each) for key in each[0]} | {"rounds": each}
        for name, each in taken.items()
    }  # fmt: skip
    for one in rows.values():
        for key in ("tokens_per_second", "tokens_per_second_alone"):
            one[f"ours_to_{key}"] = rows["preftune"][key] / one[key]
    return {"servers": rows, "left_out": left_out}


def main(given: list[str] | None = None) -> dict[str, Any]:
    """All figures and the targets."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--kinds", nargs="+", default=["tiny", "smol"], choices=["tiny", "smol"])
    made.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    made.add_argument("--no-peer", action="store_true")
    made.add_argument("--peers-only", action="store_true", help="the servers side by side, without the base with its adapters")
    made.add_argument("--rounds", type=int, default=3, help="how often every server is measured beside the others")
    made.add_argument("--tokens", type=int, help="of each answer, in place of 64 (tiny) and 24 (smol)")
    made.add_argument("--folder", type=Path, help="where models are kept between calls")
    options = made.parse_args(given)
    if options.tokens:
        TOKENS.update(dict.fromkeys(TOKENS, options.tokens))
    rows, peers = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in options.kinds:
            folder = (options.folder or Path(scratch)) / kind
            if not (folder / "three").is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                make_models(folder, kind)
            for dtype in () if options.peers_only else options.dtypes:
                rows.append(ours(folder, kind, dtype))
                measure.say(json.dumps(rows[-1]))
            if not options.no_peer:
                peers[kind] = beside_peers(folder, kind, options.rounds)
                measure.say(json.dumps(peers[kind]))
            for left in folder.glob("home-*"):
                shutil.rmtree(left)
    targets = {}
    for row in rows:
        name = f"{row['kind']} {row['dtype']}"
        targets[f"{name}: 32 chats at once at least {TARGET:.0f} x one after another"] = row["times"] >= TARGET
        if row["dtype"] == "float32":
            targets[f"{name}: every text that of the model alone"] = row["same_texts"] == CHATS
        else:
            targets[f"{name}: first differences only within {CLOSE} nat"] = row["of_these_close"] == row["answers_that_differ"]
    return {"rows": rows, "peers": peers, "targets": targets, "chats": CHATS, "threads": os.environ.get("OMP_NUM_THREADS")}


if __name__ == "__main__":
    result = main()
    print(json.dumps(result, indent=1))
    sys.exit(0 if all(result["targets"].values()) else 1)
