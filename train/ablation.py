"""`python -m train.ablation`."""

import sys

from train.evaluate.ablation import main

if __name__ == "__main__":
    sys.exit(main())
