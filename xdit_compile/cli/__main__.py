"""``python -m xdit_compile.cli``: the command, for launchers that start modules."""

import sys

from xdit_compile.cli.main import main

sys.exit(main())
