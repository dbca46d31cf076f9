"""The script's code on other hosts: the same versions installed there, and the working directory's files sent there."""
