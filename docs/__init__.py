"""The documentation: its pages, and in `hooks/` what makes parts of them from the code."""
