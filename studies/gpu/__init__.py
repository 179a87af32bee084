"""What only a GPU can answer: `python -m studies.gpu BENCHMARK`, or all of it with `make gpu`."""
