"""`python -m shearing` is `shear`."""

from __future__ import annotations

from shearing.cli import main

if __name__ == "__main__":
    main()
