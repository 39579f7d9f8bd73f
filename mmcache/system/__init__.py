"""The operating system and the interpreter: memory, threads, files, direct I/O, devices. Knows nothing of stores."""
