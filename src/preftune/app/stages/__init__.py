"""What a stage of a recipe does, one file for each kind: how it is read, checked and run."""
