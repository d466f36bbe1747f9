"""What this process has of its machine: devices, ranks, signals, files."""
