"""`python -m neuroal_jax.report`."""

from neuroal_jax.command.process import as_process

as_process("neuroal_jax.report.page")
