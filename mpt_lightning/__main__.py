"""`python -m mpt_lightning` is `mpt`."""

from mpt_lightning.cli.main import main

main()
