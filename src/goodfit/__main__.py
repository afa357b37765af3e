"""`python -m goodfit` is the command `goodfit`."""

from goodfit.cli import main

main()
