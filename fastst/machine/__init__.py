"""What is remembered of this machine: settings, files that outlive a process, measured choices."""
