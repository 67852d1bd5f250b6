"""All of Holdfast on one machine, for `holdfast up`, the demo and the tests: embedded servers and their supervision."""
