"""``python -m mptrain.cli``."""

import sys

from mptrain.cli import main

sys.exit(main())
