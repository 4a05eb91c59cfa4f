"""`python -m transformers_worldvla.cli` is `worldvla`."""

import sys

from .main import main

sys.exit(main())
