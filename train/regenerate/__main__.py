"""`python -m train.regenerate`."""

import sys

from train.regenerate.command import main

if __name__ == "__main__":
    sys.exit(main())
