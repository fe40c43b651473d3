"""``python -m hat_lib``: the same as the command ``hat``."""

from .cli import main

if __name__ == "__main__":
    main()
