"""Programs that turn checkpoints and masks into one another."""
