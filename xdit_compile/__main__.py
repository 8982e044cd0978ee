"""``python -m xdit_compile``: the command ``xdit-compile``."""

import sys

from xdit_compile.cli.main import main

sys.exit(main())
