"""What is computed on one weight or one input; imports nothing of the project."""
