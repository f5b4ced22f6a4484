"""`python -m taskvec`."""

from .cli.main import main

main()
