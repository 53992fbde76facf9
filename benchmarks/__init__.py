"""Figures of Stentor beside those of its peers: ``python -m benchmarks`` lists the rows."""
