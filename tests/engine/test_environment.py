"""What the engine's process tells its libraries, unless the operator did."""

import os
from unittest.mock import patch

from tucka_runtime.engine import environment


def test_what_the_operator_set_stays() -> None:
    with patch.dict(os.environ, {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "77"}, clear=True):
        environment.prepare()
        assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "77"
        assert os.environ["LRU_CACHE_CAPACITY"] == "16"
        assert os.environ["GOMP_SPINCOUNT"] == "10000"
