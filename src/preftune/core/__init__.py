"""Records, errors, names, the recipe, files and ports: standard library and pydantic only."""
