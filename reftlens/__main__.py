"""`python -m reftlens` is the command `reftlens`."""

import sys

from reftlens.cli import main

sys.exit(main())
