"""Reading files that someone else wrote, and writing whole files or none."""
