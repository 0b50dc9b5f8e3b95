"""The monitor: head scores of a model while it trains, from inside the loop or from outside. Needs torch when used."""
