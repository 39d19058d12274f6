"""How much of every block, linear and row is pruned: data and formulas."""
