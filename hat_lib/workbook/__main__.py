"""``python -m hat_lib.workbook``: run, execute or clean the notebooks."""

from hat_lib.workbook.runner import main

if __name__ == "__main__":
    main()
