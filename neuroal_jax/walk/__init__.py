"""Block after block: what a model is asked, one decoder block on the device at a time."""
