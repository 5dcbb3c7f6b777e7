"""Jobs that outlive a process: what the command line does at once, done by a worker for whoever asked."""
