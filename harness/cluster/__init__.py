"""A sweep on a cluster that is only described: what fits where, how long it takes, and what it costs."""
