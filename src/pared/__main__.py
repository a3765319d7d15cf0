"""`python -m pared` is the `pared` command."""

from pared.cli import main

main(prog_name="pared")
