"""Speed and memory, side by side with what they are compared to: `make bench` or `python -m benchmarks`."""
