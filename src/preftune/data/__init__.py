"""Files to packs: sources (containers), formats (schemas), tokens, packing."""
