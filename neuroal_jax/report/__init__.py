"""report.html: a run, or a sweep, as one page with plots that needs no network.

python -m neuroal_jax.report RUN_DIR

writes the report of an earlier run again, from its manifest.json and allocation.json.
"""

from neuroal_jax.report.page import REPORT, main, run_report, sweep_report

__all__ = ["REPORT", "main", "run_report", "sweep_report"]
