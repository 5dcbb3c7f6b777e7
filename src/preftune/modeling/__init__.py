"""Models: the only room that knows transformers and PEFT. Loading, adapters, the forward pass, its cache, generation."""
