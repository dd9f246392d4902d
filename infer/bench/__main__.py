"""`python -m infer.bench`."""

import sys

from infer.bench import main

if __name__ == "__main__":
    sys.exit(main())
