"""Experience: what was played, in memory and in files, and its recovery after a crash."""
