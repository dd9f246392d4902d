"""`python -m train.prompts`."""

import sys

from train.demo.prompts import main

if __name__ == "__main__":
    sys.exit(main())
