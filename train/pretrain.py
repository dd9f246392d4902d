"""`python -m train.pretrain`."""

import sys

from train.demo.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
