"""The embedded demo model: a tiny trained Llama checkpoint with calibration and evaluation text."""
