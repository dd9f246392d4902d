"""What a process needs around the pure functions: other processes, compiled programs on disk, memory, files."""
