"""``python -m attnmarkov``: the command line."""

import sys

from attnmarkov.cli import main

sys.exit(main())
