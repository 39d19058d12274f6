"""What a user types: options, their checks, how every program ends. Imports no JAX."""
