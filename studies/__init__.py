"""Studies that come with the harness, and the measurements that its documents quote."""
