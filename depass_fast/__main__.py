"""``python -m depass_fast`` is the command ``depass-fast``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
