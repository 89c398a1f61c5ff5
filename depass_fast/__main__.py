"""``python -m depass_fast`` is the command ``depass-fast``."""

from __future__ import annotations

from .cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
