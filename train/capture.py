"""`python -m train.capture`."""

import sys

from train.features.capture import main

if __name__ == "__main__":
    sys.exit(main())
