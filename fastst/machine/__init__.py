"""What is known of this machine: settings, files that outlive a process, choices."""
