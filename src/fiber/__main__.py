"""`python -m fiber` is the command `fiber`."""

import sys

from fiber.cli import main

if __name__ == "__main__":
    sys.exit(main())
