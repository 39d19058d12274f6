"""Going on after a kill."""
