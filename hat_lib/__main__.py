"""``python -m hat_lib``: the same as the command ``hat``."""

from hat_lib.cli.app import main

if __name__ == "__main__":
    main()
