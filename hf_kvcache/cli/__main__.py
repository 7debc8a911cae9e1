"""``python -m hf_kvcache.cli``."""

from hf_kvcache.cli.main import main

if __name__ == "__main__":
    main()
