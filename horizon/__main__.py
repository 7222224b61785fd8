"""`python -m horizon` is `horizon`."""

import sys

from horizon.cli import main

sys.argv[0] = "horizon"  # what help texts and shell completion call the program
main()
