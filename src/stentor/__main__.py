"""``python -m stentor`` is the command ``stentor``."""

from stentor.cli import main

if __name__ == "__main__":
    main()
