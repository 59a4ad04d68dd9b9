"""`python -m planner` is `leanplan`."""

import sys

from planner.cli import main

sys.exit(main())
