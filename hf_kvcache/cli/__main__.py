"""``python -m hf_kvcache.cli``."""

import sys

from hf_kvcache.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
