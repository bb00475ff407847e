"""The tests. `tests.reference` is the independent math that they compare with."""
