"""What runs beside the script on a host: the agent, its zygotes, the processes they fork, and the limits they keep."""
