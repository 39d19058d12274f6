"""Refinements: they change which weights a mask keeps, never how many."""
