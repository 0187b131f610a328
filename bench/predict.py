"""`python -m bench.predict`: see bench.steps.predict."""

import sys

from bench.steps.predict import main

if __name__ == "__main__":
    sys.exit(main())
