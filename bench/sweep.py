"""The benchmark of sweeps by its short name: ``python -m bench.sweep`` is ``python -m bench.speed.sweep``."""

from .speed.sweep import main

if __name__ == "__main__":
    main()
