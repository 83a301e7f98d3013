"""``python -m fastst`` says what is installed, built and able to run here."""

from .info import main

if __name__ == "__main__":
    main()
