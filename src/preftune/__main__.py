"""``python -m preftune``: the command line."""

from preftune.cli.main import main

if __name__ == "__main__":
    main()
