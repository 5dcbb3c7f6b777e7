"""How the embedded starter and its data were made: scripts of the repository, no part of the package."""
