"""The command line: click, lazy, one file per verb."""
