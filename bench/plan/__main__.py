"""`python -m bench.plan`: see bench.plan.command."""

import sys

from bench.plan.command import main

if __name__ == "__main__":
    sys.exit(main())
