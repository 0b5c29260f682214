"""`python -m tucka_runtime.loadtest.peers`"""

import sys

from tucka_runtime.loadtest.peers.command import main

sys.exit(main())
