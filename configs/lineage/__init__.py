"""The released configurations of V3 and V3.2 (JSON), as data."""
