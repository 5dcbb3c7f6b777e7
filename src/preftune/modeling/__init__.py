"""Models: the only room that knows transformers and PEFT. Loading, adapters, the forward pass, its cache, generation."""

import logging

# PEFT imports bitsandbytes where it is installed, and on a CPU that recommends a package which fetches code from the hub
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
