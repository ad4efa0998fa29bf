"""``python -m jaxsi`` is ``jaxsi``."""

import sys

from jaxsi.main import main

sys.exit(main())
