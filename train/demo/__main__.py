"""`python -m train.demo`."""

import sys

from train.demo.command import main

if __name__ == "__main__":
    sys.exit(main())
