"""`python -m neuroal_jax.report`."""

import sys

from neuroal_jax.report.page import main

sys.exit(main())
