"""``python -m dsasr.cli``: the ``dsasr`` command of this checkout."""

import sys

from dsasr.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
