"""Models: the only room that knows transformers and PEFT. Loading, adapters, the forward pass, its cache, generation."""

import logging

from preftune.core.loading import without_collections

# PEFT imports bitsandbytes where it is installed, and on a CPU that recommends a package which fetches code from the hub
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

with without_collections():
    import peft  # noqa: F401  # here, so that no module of this room loads it with collections
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  # these too
