"""`python -m lccp_interp.cli` is `lccp`."""

from lccp_interp.cli import main

main()
