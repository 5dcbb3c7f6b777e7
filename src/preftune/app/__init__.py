"""One function per verb, the same one for the command line, Python and later the server."""
