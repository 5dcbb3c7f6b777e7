"""llama.cpp's server on one GGUF file, from the wheel of `.venv-llama` (xllamacpp holds llama.cpp's own server).

Runs with that environment's interpreter and says `listening on http://127.0.0.1:PORT`; ends with SIGTERM or SIGINT.
"""

import argparse
import signal
import threading

import xllamacpp
from xllamacpp import CommonParams, Server, ggml_type, llama_flash_attn_type


def parameters(options: argparse.Namespace) -> CommonParams:
    """What llama-server's options of the same names set."""
    made = CommonParams()
    made.model.path = options.model
    made.n_parallel, made.n_ctx = options.parallel, options.parallel * options.context
    made.kv_unified = False  # every conversation has a context of its own, as llama-server shares it out with --parallel
    made.cpuparams.n_threads = made.cpuparams_batch.n_threads = options.threads
    if options.exact:
        made.cache_type_k = made.cache_type_v = ggml_type.GGML_TYPE_F32
        made.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return made


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("model", help="a GGUF file")
    made.add_argument("--parallel", type=int, default=1, help="conversations at once")
    made.add_argument("--context", type=int, default=512, help="positions of each")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--exact", action="store_true", help="keys and values in float32 and plain attention, in place of float16")
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    server = Server(parameters(made.parse_args()))
    print(xllamacpp.get_system_info(), flush=True)
    print(f"listening on {server.listening_address}", flush=True)
    ended.wait()


if __name__ == "__main__":
    main()
