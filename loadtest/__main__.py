"""`python -m tucka_runtime.loadtest`"""

import sys

from tucka_runtime.loadtest.cli import main

sys.exit(main())
