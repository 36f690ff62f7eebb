"""`python -m eval.cli`, where the command is not installed."""

from eval.cli import main

main()
