"""What scheduling costs a trial: sweeps of trials that do nothing for 2 seconds; `python -m studies.overhead`."""
