"""`python -m train.validate`."""

import sys

from train.evaluate.validate import main

if __name__ == "__main__":
    sys.exit(main())
