"""The same F and G in other reversible libraries and in ours, side by side: `python -m studies.peers`."""
