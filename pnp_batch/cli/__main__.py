"""`python -m pnp_batch.cli` is `pnp-batch`."""

from pnp_batch.cli import main

main()
