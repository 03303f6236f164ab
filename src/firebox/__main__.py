"""`python -m firebox` is the command line."""

from firebox.cli.main import main

main()
