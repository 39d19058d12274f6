"""One run, from options to files."""
