"""`python -m calibration`: see `calibration.run`."""

from calibration.run import main

if __name__ == "__main__":
    main()
