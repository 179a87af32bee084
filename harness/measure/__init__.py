"""Memory, time, drift and the machine: what is read off a trial. No thresholds here."""
