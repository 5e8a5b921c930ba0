"""Experience: recorded steps in memory and in files, and their recovery after a crash."""
