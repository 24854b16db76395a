"""`python -m sumizome`, as `torchrun -m sumizome` needs it."""

import sys

from sumizome.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
