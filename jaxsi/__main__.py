"""``python -m jaxsi`` is ``jaxsi``."""

import sys

from jaxsi.cli.main import main

sys.exit(main())
